"""The .npy records of the dump: zero-dimensional structured arrays, one named field per quantity.

They load with `np.load(path, allow_pickle=False)`, hold no pickles, and can be memory-mapped, so that a reader
touches only the rows it uses. A field that is unknown (a path, say) holds the empty string.
"""
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tools.cli import InputError
from tools.files import atomic_path, below, check_file
from tools.geometry import is_camera_matrix, is_rigid


def _finite(values: np.ndarray) -> str:
    return "" if np.isfinite(values).all() else "has values that are not finite"


def _positive(values: np.ndarray) -> str:
    return "" if (values > 0).all() else f"is {values.tolist()}, not positive"


def _camera(K: np.ndarray) -> str:
    return "" if is_camera_matrix(K) else _finite(K) or "is not a camera matrix"


def _rigid(pose: np.ndarray) -> str:
    return "" if is_rigid(pose) else _finite(pose) or "is not a rotation and translation"


def _name(value: np.ndarray) -> str:
    try:
        below(".", value.item())
    except InputError as error:
        return f"is refused: {error}"
    return ""


class Field(NamedTuple):
    """What a field of a record holds.

    kinds: `numpy.dtype.kind`s that are admitted; shape: a letter in it is a length that is the same for all fields of
    a record; check: values -> what is wrong with them, or ""; optional: it may be missing.
    """

    kinds: str
    shape: tuple = ()
    check: Callable | None = None
    optional: bool = False


# N keypoints of D channels. Lengths and cameras as in scene_info: K in COLMAP's pixel convention, pose world-to-camera.
KEYPOINT_FIELDS = {
    "image_path": Field("U", (), _name),
    "depth_path": Field("U"),
    "image_size": Field("i", (2,), _positive),  # w, h
    "intrinsics": Field("fi", (3, 3), _camera),
    "pose": Field("fi", (4, 4), _rigid),
    "keypoints": Field("f", ("N", 2), _finite),
    "scores": Field("f", ("N",), _finite),
    "descriptors": Field("f", ("N", "D")),  # most of a record, so --verify alone looks at its values
    "depth": Field("f", ("N",), _finite),  # 0: unknown
}
# M matches, rows of the two images' keypoints: see `check_matches`.
MATCH_FIELDS = {
    "image_path0": Field("U", (), _name),
    "image_path1": Field("U", (), _name),
    "intrinsics0": Field("fi", (3, 3), _camera),
    "intrinsics1": Field("fi", (3, 3), _camera),
    "pose0": Field("fi", (4, 4), _rigid),
    "pose1": Field("fi", (4, 4), _rigid),
    "matches": Field("i", ("M", 2)),
    "overlap": Field("f"),  # NaN: unknown
}


def write_record(path, record: dict) -> None:
    """Write arrays, numbers and strings as one record, atomically; None is stored as the empty string."""
    arrays = {name: np.asarray("" if value is None else value) for name, value in record.items()}
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise TypeError(f"field {name} of {path} holds objects")
    # aligned, so that numbers of a memory-mapped record can be read in place
    dtype = np.dtype([(name, array.dtype, array.shape) for name, array in arrays.items()], align=True)
    packed = np.zeros((), dtype)
    for name, array in arrays.items():
        packed[name] = array
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        # write_array would do both, but does not tell what went wrong when a disk is full
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(packed))
        file.write(packed.tobytes())


def read_record(path, fields: dict[str, Field] | None = None, mmap: bool = False, **lengths: int) -> dict:
    """Read a record -> dict of arrays; strings and numbers come as Python scalars.

    fields: what must be there, and is returned; None: all that is there, as it is. lengths: those of letters that are
    known, as D=128. With `mmap`, arrays are read-only views of the file. InputError if it is missing, truncated, no
    record, or one that says something else.
    """
    check_file(path, "record")
    try:
        packed = _read_packed(path, mmap)
    except OSError as error:
        raise InputError(f"cannot read record {path}: {error.strerror or error}") from None
    except Exception as error:  # whatever a damaged header makes of NumPy's reader
        raise InputError(f"{path} is not a whole record: {error}; delete it and run the dump again") from None
    plain, record = packed.view(np.ndarray), {}  # checks are faster on plain arrays
    for name, field in (dict.fromkeys(packed.dtype.names) if fields is None else fields).items():
        if name in packed.dtype.names:
            problem = _problem(plain[name], field, lengths)
            if problem:
                raise InputError(f"{path} is damaged: its {name} {problem}")
            record[name] = plain[name].item() if plain[name].shape == () else packed[name]
        elif not field.optional:
            raise InputError(f"{path} is damaged: it lacks {name}")
    return record


def _read_packed(path, mmap: bool) -> np.ndarray:
    """The array of a .npy file, as it is; ValueError if it is something else than a whole record."""
    with open(path, "rb") as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("it is of another version of .npy")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if shape != () or dtype.names is None or dtype.hasobject:
            raise ValueError("it holds no named fields of numbers and text")
        # before memory is taken for what the header claims
        if os.fstat(file.fileno()).st_size < file.tell() + dtype.itemsize:
            raise ValueError("it ends too soon")
        return np.memmap(file, dtype, "r", file.tell(), ()) if mmap else np.fromfile(file, dtype, 1).reshape(())


def _problem(values: np.ndarray, field: Field | None, lengths: dict[str, int]) -> str:
    """What is wrong with the values of a field, or ""; new lengths are added."""
    dtype, shape = values.dtype, values.shape
    # NumPy takes any 32 bits for a letter, and Python crashes later
    if dtype.kind == "U" and values.nbytes and values.ravel().view(dtype.byteorder + "u4").max() > sys.maxunicode:
        return "is not text"
    if field is None:
        return ""
    if dtype.kind not in field.kinds or not dtype.isnative or dtype.char == "g":
        return f"is of type {dtype}"
    wanted = tuple(lengths.setdefault(side, n) if isinstance(side, str) else side
                   for side, n in zip(field.shape, shape)) + field.shape[len(shape):]
    if shape != wanted:
        return f"are {shape}, not {wanted}"
    return field.check(values) if field.check else ""


def check_matches(path, matches: np.ndarray, counts) -> None:
    """InputError unless matches (M, 2), of the record at `path`, are of keypoints that there are, each at most once.

    counts: how many keypoints each of the two views has.
    """
    for v, (indices, n) in enumerate(zip(matches.T, counts)):
        if len(indices) and not 0 <= indices.min() <= indices.max() < n:
            raise InputError(f"{path} is damaged: its matches name keypoints that view {v}, of {n}, does not have")
        if np.bincount(indices, minlength=1).max() > 1:
            raise InputError(f"{path} is damaged: a keypoint of view {v} is matched twice")
