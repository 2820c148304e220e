from .checks import check_pairs as check_pairs
from .load import LoadPair as LoadPair
from .load import collate_pairs as collate_pairs
from .pairs import list_pairs as list_pairs
from .pairs import working_grid as working_grid
