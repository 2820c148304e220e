from .loss import RegistrationLoss as RegistrationLoss
from .modules import term_of as term_of
from .terms import TERMS as TERMS
from .terms import Term as Term
