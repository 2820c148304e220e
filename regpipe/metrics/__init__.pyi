from . import measures as measures
from .cases import CaseMetrics as CaseMetrics
from .measured import Measured as Measured
from .measured import measure as measure
from .metric import METRICS as METRICS
from .metric import Metric as Metric
