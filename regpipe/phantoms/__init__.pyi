from .cohort import write_cohort as write_cohort
from .synthetic import make_batch as make_batch
