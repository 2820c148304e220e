from . import measures as measures
from .cases import CaseMetrics as CaseMetrics
from .measures import Measured as Measured
from .measures import measure as measure
from .metric import METRICS as METRICS
from .metric import Metric as Metric
