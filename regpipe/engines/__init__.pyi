from .inferers import RegistrationInferer as RegistrationInferer
from .inferers import ZeroInferer as ZeroInferer
from .inferers import prepare_batch as prepare_batch
from .refine import Refiner as Refiner
from .run import Run as Run
