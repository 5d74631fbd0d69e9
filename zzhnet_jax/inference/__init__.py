"""Change maps of images of any size: tiling, the jitted predictor, and pictures of the results."""

from .pictures import PictureRow, contact_sheet, four_panel
from .predictor import Prediction, Predictor, predict
from .tiling import Tiling

__all__ = [
    "PictureRow",
    "Prediction",
    "Predictor",
    "Tiling",
    "contact_sheet",
    "four_panel",
    "predict",
]
