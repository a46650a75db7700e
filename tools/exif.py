"""What a photograph's EXIF data say of the camera: which way was up, and the focal length."""
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image
from PIL.ExifTags import IFD, Base

from tools.files import check_file

MILLIMETRES = {3: 10.0, 4: 1.0, 5: 1e-3}  # of a resolution unit; others are inches, or taken for them
FILM_DIAGONAL = float(np.hypot(36, 24))  # millimetres
# np.rot90 turns by orientation; the mirrored ones (2, 4, 5, 7) are not turned, as no camera stands for them
TURNS = {3: 2, 6: 3, 8: 1}
MAX_ASPECT_CHANGE = 0.02  # relative; more means that the picture was cropped
FOCAL_RANGE = (0.2, 15.0)  # in diagonals of the image, 9 to 650 mm on film: beyond, the tags contradict each other


@dataclass
class Exif:
    """turns: np.rot90 turns that make the image as stored upright. focal: pixels of the image as stored, or None."""

    turns: int = 0
    focal: float | None = None


def read_exif(path) -> Exif:
    """What the EXIF data of an image file say; Exif() if it has none, or none that can be read.

    The focal length comes from its 35 mm equivalent, which is by the diagonal (CIPA DCG-001), or else from the focal
    length in millimetres and the resolution of the focal plane, which is wrong where a program that made the image
    smaller noted its new size only. It is None for an image that was cropped since, if the tags show it.
    """
    try:
        check_file(path)
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            tags = image.getexif()
            return Exif(TURNS.get(tags.get(Base.Orientation), 0), _focal(tags.get_ifd(IFD.Exif), image.size))
    except Exception:  # whatever a damaged file makes of Pillow's readers
        return Exif()


def _focal(details: dict, size: tuple[int, int]) -> float | None:
    """Focal length in pixels of an image of `size` (w, h), from the tags of its EXIF directory, or None."""
    recorded = _number(details, Base.ExifImageWidth), _number(details, Base.ExifImageHeight)
    shrink = 1.0
    if None not in recorded:
        # the longer sides: some programs turn the pixels and leave the tags
        shrink = max(size) / max(recorded)
        if abs(min(size) / (shrink * min(recorded)) - 1) > MAX_ASPECT_CHANGE:
            return None
    diagonal = float(np.hypot(*size))
    equivalent, focal_length = _number(details, Base.FocalLengthIn35mmFilm), _number(details, Base.FocalLength)
    resolution = _number(details, Base.FocalPlaneXResolution)
    if equivalent is not None:
        focal = equivalent / FILM_DIAGONAL * diagonal
    elif focal_length is not None and resolution is not None:
        focal = focal_length * resolution / MILLIMETRES.get(details.get(Base.FocalPlaneResolutionUnit), 25.4) * shrink
    else:
        return None
    return focal if FOCAL_RANGE[0] * diagonal < focal < FOCAL_RANGE[1] * diagonal else None


def _number(details: dict, tag: int) -> float | None:
    """A tag as a positive number, or None: cameras write 0, 0/0 or nothing for what they do not know."""
    try:
        value = float(details[tag])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return value if np.isfinite(value) and value > 0 else None
