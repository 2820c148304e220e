from .loss import RegistrationLoss as RegistrationLoss
from .terms import TERMS as TERMS
from .terms import Term as Term
