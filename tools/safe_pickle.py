"""Read pickled NumPy arrays of others' files without running code.

scene_info, MegaDepth-1500 and YFCC's pair lists are pickles, and a pickle may name any function to call. The
unpickler here admits arrays, dicts, lists, tuples, strings and numbers, and nothing else.
"""
import io
import pickle
import zipfile
from pathlib import Path

import numpy as np

from tools.cli import InputError

_ARRAY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_ALLOWED = {
    **{(module, "_reconstruct"): np._core.multiarray._reconstruct for module in _ARRAY_MODULES},
    **{(module, "scalar"): np._core.multiarray.scalar for module in _ARRAY_MODULES},
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.numeric", "_frombuffer"): np._core.numeric._frombuffer,
    ("numpy._core.numeric", "_frombuffer"): np._core.numeric._frombuffer,
}


def _encode_latin1(text: str, encoding: str) -> bytes:
    """What `_codecs.encode` does for the bytes in pickles of protocol 2, and no other codec."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"codec {encoding} is not admitted")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) == ("_codecs", "encode"):
            return _encode_latin1
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not admitted") from None


def _unpickle(stream, path):
    try:
        # latin1: arrays pickled by Python 2 hold their bytes as str
        return _ArrayUnpickler(stream, encoding="latin1").load()
    except Exception as error:
        raise InputError(f"refused to unpickle {path}: {error} (only arrays, dicts, lists and numbers are read)"
                         ) from None


def load_pickle(path):
    """Read a pickle file that holds arrays, dicts, lists, tuples, strings and numbers; InputError otherwise."""
    try:
        with open(path, "rb") as file:
            return _unpickle(io.BytesIO(file.read()), path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def _read_npy(stream, path):
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    dtype = read_header(stream)[-1]
    if dtype.hasobject:
        array = _unpickle(stream, path)
        if not isinstance(array, np.ndarray):
            raise InputError(f"{path} holds a pickle that is not an array")
        return array
    stream.seek(0)
    return np.lib.format.read_array(stream, allow_pickle=False)


def load_npz(path) -> dict:
    """Read an .npz whose arrays may hold objects -> dict of arrays.

    Some public files are named .npz but are one pickle (MegaDepth-1500's): what it holds is returned.
    """
    if not Path(path).is_file():
        raise InputError(f"file not found: {path}")
    if not zipfile.is_zipfile(path):
        return load_pickle(path)
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            return {name[:-4]: _read_npy(io.BytesIO(archive.read(name)), f"{path}:{name}") for name in names}
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise InputError(f"{path} is damaged: {error}") from None
