"""The .npy records of the dump (SPEC 5): zero-dimensional structured arrays, one named field per quantity.

They load with `np.load(path, allow_pickle=False)`, hold no pickles, and can be memory-mapped, so that a reader
touches only the rows it uses. A field that is unknown (a path, say) holds the empty string.
"""
from pathlib import Path

import numpy as np

from tools.cli import InputError
from tools.files import atomic_path


def write_record(path, record: dict) -> None:
    """Write arrays, numbers and strings as one record, atomically; None is stored as the empty string."""
    arrays = {name: np.asarray("" if value is None else value) for name, value in record.items()}
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise TypeError(f"field {name} of {path} holds objects")
        if array.dtype.kind == "U" and array.dtype.itemsize == 0:  # a zero-width string field cannot be memory-mapped
            arrays[name] = array.astype("U1")
    # aligned, so that numbers of a memory-mapped record can be read in place
    dtype = np.dtype([(name, array.dtype, array.shape) for name, array in arrays.items()], align=True)
    packed = np.zeros((), dtype)
    for name, array in arrays.items():
        packed[name] = array
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        # write_array would do both, but does not tell what went wrong when a disk is full
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(packed))
        file.write(packed.tobytes())


def read_record(path, mmap: bool = False) -> dict:
    """Read a record -> dict of arrays; strings and numbers come as Python scalars.

    With `mmap`, arrays are read-only views of the file. InputError if it is missing, truncated or no record.
    """
    try:
        packed = np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except OSError as error:
        raise InputError(f"cannot read record {path}: {error.strerror or error}") from None
    except Exception as error:  # whatever a damaged header makes of NumPy's reader
        raise InputError(f"{Path(path)} is not a whole record: {error}; delete it and run the dump again") from None
    if packed.dtype.names is None or packed.shape != ():
        raise InputError(f"{path} is not a record: it holds no named fields")
    record = {name: packed[name] for name in packed.dtype.names}
    return {name: value.item() if value.shape == () else value for name, value in record.items()}
