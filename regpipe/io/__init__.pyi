from .images import Grid as Grid
from .images import Image as Image
from .images import read_image as read_image
from .labels import read_label as read_label
from .landmarks import read_landmarks as read_landmarks
