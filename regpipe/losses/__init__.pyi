from .terms import TERMS as TERMS
from .terms import RegistrationLoss as RegistrationLoss
