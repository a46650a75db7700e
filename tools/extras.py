"""Optional packages: imported where they are used, with one line that says how to install a missing one."""
from importlib import import_module

from tools.cli import InputError


def import_pycolmap():
    """The module pycolmap, silent but for its errors; InputError that says how to install it when it is missing."""
    try:
        import_module("cv2")  # first: in the other order the process crashes when a PNG is written
        pycolmap = import_module("pycolmap")
    except ImportError:
        raise InputError("pycolmap is not installed: pip install '.[colmap]'") from None
    pycolmap.logging.minloglevel = pycolmap.logging.ERROR
    return pycolmap
