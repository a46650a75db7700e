"""Read pickled NumPy arrays of others' files without running code.

scene_info, MegaDepth-1500 and YFCC's pair lists are pickles, and a pickle may name any function to call. The
unpickler here admits arrays, dicts, lists, tuples, strings and numbers, and nothing else. NumPy's own functions are
not handed out either: `numpy.dtype` and `ndarray.__setstate__` trust what they are given, and a made-up dtype makes
them take bytes for pointers. What stands in for them here takes plain dtypes and data of exactly the right size.
"""
import functools
import io
import math
import pickle
import re
import zipfile

import numpy as np

from tools.cli import InputError
from tools.files import damaged, read_bytes

PLAIN_DTYPE = re.compile(r"[<>|=]?(\?|b1|[iu][1248]|f[248]|c(8|16)|[SU]\d{1,5}|O[48]?)")
# scene_info files shrink 2 to 10 times, those of few points in many images 20 times; a file of zeros 1000 times
MAX_COMPRESSION, SMALL = 40, 2 ** 22


class _DType:
    """Stands in for `numpy.dtype` while unpickling."""

    def __init__(self, code, align=False, copy=False):
        if not PLAIN_DTYPE.fullmatch(code):
            raise pickle.UnpicklingError(f"dtype {code[:20]!r} is not admitted")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        _, order, *structure = state[:5]
        if order not in ("<", ">", "|", "=") or structure != [None, None, None]:
            raise pickle.UnpicklingError("a structured dtype is not admitted")
        self.dtype = self.dtype.newbyteorder(order)


class _Array(np.ndarray):
    """An array as it comes out of a pickle: read-only, so that no opcode can assign to its elements."""

    def __new__(cls, *args):
        if args:
            raise pickle.UnpicklingError("a call of numpy.ndarray is not admitted")
        return super().__new__(cls, 0)

    def __setstate__(self, state):
        shape, dtype, fortran, data = state[-4:]
        if not self.flags.writeable:
            raise pickle.UnpicklingError("an array is set twice")
        dtype, data = dtype.dtype, data.encode("latin1") if isinstance(data, str) else data
        n = math.prod(_whole(side) for side in shape)
        kinds, size = (list, n) if dtype.hasobject else ((bytes, bytearray), n * dtype.itemsize)
        if not isinstance(data, kinds) or len(data) != size:
            raise pickle.UnpicklingError(f"an array of shape {shape} does not have as much data")
        super().__setstate__((1, shape, dtype, bool(fortran), data if dtype.hasobject else bytes(data)))
        self.flags.writeable = False

    def __reduce_ex__(self, protocol):  # to other processes and into files as a plain array
        return self.view(np.ndarray).__reduce_ex__(protocol)


def _whole(side) -> int:
    if type(side) is not int or side < 0:
        raise pickle.UnpicklingError("the shape of an array is not of whole numbers")
    return side


class _Function(functools.partial):
    """A function that a pickle may call and not set attributes of."""

    def __setstate__(self, state):
        raise pickle.UnpicklingError("a function has no state")


@_Function
def _reconstruct(cls, shape, code):
    return _Array()


@_Function
def _frombuffer(data, dtype, shape, order):
    array = _Array()
    array.__setstate__((shape, dtype, order == "F", data))
    return array


@_Function
def _scalar(dtype, data):
    if dtype.dtype.hasobject:
        raise pickle.UnpicklingError("a scalar of objects is not admitted")
    return _frombuffer(data, dtype, (), "C")[()]


@_Function
def _encode(text: str, encoding: str) -> bytes:
    """What `_codecs.encode` does for the bytes in pickles of protocol 2, and no other codec."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"codec {encoding} is not admitted")
    return text.encode("latin1")


# name in a pickle, as NumPy 1 and 2 write it -> what stands in for it
STAND_INS = {"numpy.dtype": _DType, "numpy.ndarray": _Array, "_codecs.encode": _encode}
for _core in ("numpy.core", "numpy._core"):
    STAND_INS |= {f"{_core}.multiarray._reconstruct": _reconstruct, f"{_core}.multiarray.scalar": _scalar,
                  f"{_core}.numeric._frombuffer": _frombuffer}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if f"{module}.{name}" not in STAND_INS:
            raise pickle.UnpicklingError(f"{module}.{name} is not admitted")
        return STAND_INS[f"{module}.{name}"]


def _check_opcodes(data: bytes) -> None:
    """Raise UnpicklingError for opcodes that data has no use for, or that ask for more memory than `data` warrants.

    Runs of harmless opcodes are matched at once: a loop over the opcodes would take longer than loading.
    """
    places = len(data) // 4 + 256  # in the memo: a list as long as its greatest index, whatever is in it
    low, high = re.escape(bytes([places >> 16 & 255])), re.escape(bytes([places >> 24]))
    index = b"(?:..[\0-%b]\0)" % low if high == b"\\\0" or high == b"\0" else b"(?:...[\0-%b])" % high
    harmless = re.compile(
        rb"(?:[](}{)ldtaesuNRb\x85-\x89\x93\x94]|[Kqh\x80].|M..|[Jj].{4}|G.{8}|r%b|[IFLVSg][^\n]*\n|p\d{1,%d}\n"
        rb"|c[^\n]*\n[^\n]*\n)*+" % (index, len(str(places))), re.DOTALL)
    lengths = {**dict.fromkeys(b"UC\x8c\x8a", 1), **dict.fromkeys(b"TXB", 4), **dict.fromkeys(b"\x8d\x8e\x96\x95", 8)}
    at = containers = 0
    while True:
        start, at = at, harmless.match(data, at).end()
        containers += sum(data.count(opcode, start, at) for opcode in (b"]", b"}", b"R"))
        if containers > len(data) / 6 + 4096:  # each takes 60 bytes and more
            raise pickle.UnpicklingError("it holds little but empty lists")
        if at == len(data):
            raise pickle.UnpicklingError("it is cut off")
        op = data[at]
        if op == pickle.STOP[0]:
            return
        if op not in lengths:
            raise pickle.UnpicklingError(f"opcode {bytes([op])!r} at byte {at} is not admitted")
        at += 1 + lengths[op]
        length = int.from_bytes(data[at - lengths[op]:at], "little")
        if at + length > len(data):
            raise pickle.UnpicklingError("it is cut off")
        at += length if op != pickle.FRAME[0] else 0


def _unpickle(data: bytes, path):
    with damaged(f"refused to unpickle {path}", " (only arrays, dicts, lists and numbers are read)"):
        _check_opcodes(data)
        # latin1: arrays pickled by Python 2 hold their bytes as str
        return _ArrayUnpickler(io.BytesIO(data), encoding="latin1").load()


def _parse_npy(data: bytes, path) -> np.ndarray:
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(stream)
    data = data[stream.tell():]
    if dtype.hasobject:
        array = _unpickle(data, path)
        if not isinstance(array, np.ndarray):
            raise InputError(f"{path} holds a pickle that is not an array")
        return np.array(array)  # no longer read-only
    if not PLAIN_DTYPE.fullmatch(dtype.str) or math.prod(map(_whole, shape)) * dtype.itemsize != len(data):
        raise pickle.UnpicklingError(f"no {len(data)} bytes for shape {shape} of {dtype.str[:20]}")
    return np.ndarray(shape, dtype, bytearray(data), order="F" if fortran else "C")


def load_pickle(path):
    """Read a pickle file that holds arrays, dicts, lists, tuples, strings and numbers; InputError otherwise.

    Arrays in it are read-only.
    """
    return _unpickle(read_bytes(path), path)


def load_npy(path) -> np.ndarray:
    """Read an .npy whose array may hold objects; InputError if it is missing, damaged, or holds more than data."""
    with damaged(f"{path} is damaged", "; get or make it again"):
        return _parse_npy(read_bytes(path), path)


def load_npz(path) -> dict:
    """Read an .npz whose arrays may hold objects -> dict of arrays.

    Some public files are named .npz but are one pickle (MegaDepth-1500's): what it holds is returned.
    """
    data = read_bytes(path)
    if data[:2] != b"PK":
        return _unpickle(data, path)
    with damaged(f"{path} is damaged", "; get or make it again"), zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [member for member in archive.infolist() if member.filename.endswith(".npy")]
        if sum(member.file_size for member in members) > MAX_COMPRESSION * len(data) + SMALL:
            raise pickle.UnpicklingError(f"unpacked it would be more than {MAX_COMPRESSION} times its size")
        return {member.filename[:-4]: _parse_npy(archive.read(member), f"{path}:{member.filename}")
                for member in members}


def numbers(value, *shape, name: str = "a value") -> np.ndarray:
    """A new float64 array from an array, or lists or tuples of numbers, of a file; InputError unless it has `shape`.

    None in `shape`: any length. Lists are checked level by level, as one that holds itself has no size.
    """
    def check(part, shape) -> bool:
        if isinstance(part, np.ndarray):
            return part.dtype.kind in "biuf" and part.ndim == len(shape) and all(
                wanted in (None, side) for wanted, side in zip(shape, part.shape))
        if shape:
            return isinstance(part, list | tuple) and shape[0] in (None, len(part)) and all(
                check(inner, shape[1:]) for inner in part)
        return isinstance(part, float | np.floating | np.integer) or (isinstance(part, int) and abs(part) < 2 ** 63)

    if not check(value, shape):
        raise InputError(f"{name} is not of {' x '.join('n' if side is None else str(side) for side in shape)} numbers")
    return np.array(value, np.float64)
