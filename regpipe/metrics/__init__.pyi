from .cases import CaseMetrics as CaseMetrics
from .measures import HIGHER_IS_BETTER as HIGHER_IS_BETTER
from .measures import measure as measure
