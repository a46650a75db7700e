"""Seeded mutations of files, for tests/fuzz.py: of bytes, of what a file holds, and of what lies in its place."""
import io
import json
import os
import pickle
import random
import shutil
import zipfile
from pathlib import Path

import h5py
import numpy as np
import torch
import yaml

HEADS = [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0\0\x10JFIF", b"\x89HDF\r\n\x1a\n", b"\x93NUMPY\x01\0v\0",
         b"PK\x03\x04", b"\x80\x04\x95", b"\x80\x02}q\x00", b"II*\0\x08\0\0\0", b"BM", b"GIF89a", b"%YAML 1.1\n",
         b"\xff\xfe", b"\xef\xbb\xbf", b"{", b"[" * 5000, b"P5\n"]
TEXTS = ["", " ", "\0", "a\0b", "../up.jpg", "../../up.jpg", "/nowhere/x.jpg", "C:\\x.jpg", "x" * 300, "x" * 5000,
         "a/b/c", "\udcff\udcfe", "\n", "two\nlines", "é\u202e", "nan", "1e400", "-", "None", "null", "~", ".", "..",
         "-1", "{}", "%s", "a.b.c", "~/x"]
NUMBERS = [0, 1, -1, 2, 0.5, float("nan"), float("inf"), -float("inf"), 1e-300, 1e300, -1e9, 2 ** 31, 2 ** 63,
           -2 ** 63 - 1, 2 ** 64 - 1, 10 ** 400,
           True, 1e9, 3.0]
DTYPES = ["f4", "f8", "f2", "i1", "i4", "i8", "u1", "u8", "?", "c16", "S3", "U3", "M8[s]", ">f4", "f4,i4"]
MATRICES = [np.zeros((3, 3)), np.ones((3, 3)), np.eye(4), np.zeros((4, 4)), np.full((3, 3), np.nan), -np.eye(3),
            np.diag([1e300, 1e300, 1]), np.diag([1e-300, 1e-300, 1]), np.eye(2), np.zeros((0, 2)), np.zeros((0,)),
            np.zeros(()), np.zeros((2, 0, 3))]


def odd_value(rng: random.Random):
    """Anything but what a field should hold."""
    nested = []
    for _ in range(rng.choice([2, 50, 200])):
        nested = [nested]
    return rng.choice([None, rng.choice(TEXTS), rng.choice(NUMBERS), [], {}, nested, b"bytes", {"a": None},
                       ["a", 1, None], rng.choice(MATRICES), [[1, 2], [3]], (1, 2)])


def odd_array(array: np.ndarray, rng: random.Random) -> np.ndarray:
    """An array with another shape, type or value."""
    array = np.array(array)
    for _ in range(rng.choice([1, 1, 1, 2])):
        way = rng.randrange(12)
        with np.errstate(all="ignore"):
            if way < 5 and array.size and array.dtype.kind in "fiub":
                places = rng.choice([rng.randrange(array.size), rng.randrange(array.size), slice(None)])
                try:
                    array.reshape(-1)[places] = rng.choice(NUMBERS)
                except (OverflowError, ValueError):
                    array.reshape(-1)[places] = rng.choice([0, 1])
            elif way < 7:
                array = np.atleast_1d(array)
                array = rng.choice([array.T, array.ravel(), array[None], array[..., None], array[:0], array[:1],
                                    array[:-1], array[::-1], array[..., :1], np.concatenate([array, array]),
                                    np.concatenate([array, array], axis=-1)])
            elif way < 9 and array.dtype.kind in "fiub":
                array = array.astype(rng.choice(DTYPES))
            elif way < 11 and array.dtype.kind in "fiu":
                array = (array * np.array(rng.choice([-1, 0, 1e6, 1e-6, 0.5]))).astype(array.dtype)
            else:
                array = np.array(rng.choice(MATRICES))
    return array


def odd_text(text: str, rng: random.Random) -> str:
    """A text with a part of it, or all, replaced."""
    place = rng.randrange(len(text) + 1)
    return rng.choice([rng.choice(TEXTS), text[:place], text[:place] + rng.choice(TEXTS) + text[place:],
                       rng.choice(TEXTS) + text, text * 2])


def change(value, rng: random.Random):
    """A tree of dicts, lists, arrays and numbers with one thing in it changed; the tree itself stays as it is."""
    if isinstance(value, dict) and value and rng.random() < 0.93:
        key = rng.choice(list(value))
        if rng.random() < 0.12:
            return {name: content for name, content in value.items() if name != key}
        if rng.random() < 0.05:
            return {(rng.choice(TEXTS) if name == key else name): content for name, content in value.items()}
        if rng.random() < 0.05:
            return {**value, rng.choice([*TEXTS, "extra"]): odd_value(rng)}
        return {**value, key: change(value[key], rng)}
    is_objects = isinstance(value, np.ndarray) and value.dtype.hasobject and value.ndim > 0
    if (is_objects or isinstance(value, list | tuple)) and len(value) and rng.random() < 0.9:
        items, place, way = list(value), rng.randrange(len(value)), rng.random()
        if way < 0.1:
            del items[place]
        elif way < 0.2:
            items.insert(place, rng.choice(items))
        else:
            items[place] = change(items[place], rng)
        return np.fromiter(items, object, len(items)) if is_objects else type(value)(items)
    if rng.random() < 0.2:
        return odd_value(rng)
    if isinstance(value, torch.Tensor):
        changed = odd_array(value.detach().numpy(), rng)
        return torch.from_numpy(changed.copy()) if changed.dtype.kind in "fiu" and changed.dtype.isnative else changed
    if isinstance(value, np.ndarray):
        return odd_array(value, rng)
    if isinstance(value, str):
        return odd_text(value, rng)
    if isinstance(value, bool | int | float | np.number):
        return rng.choice([*NUMBERS, str(value), [value]])
    return odd_value(rng)


# formats: a file's content -> a changed one

def _dumped(value) -> bytes:
    """An .npy file of an array, or of any object."""
    buffer = io.BytesIO()
    np.save(buffer, value if isinstance(value, np.ndarray) else np.fromiter([value], object, 1).reshape(()))
    return buffer.getvalue()


def _npz(path, rng):
    with np.load(path, allow_pickle=True) as file:
        content = change({name: file[name] for name in file}, rng)
    if not isinstance(content, dict):
        return _dumped(np.asarray(content, object))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
        for name, value in content.items():
            archive.writestr(f"{name}.npy".replace("\0", "_").encode(errors="replace").decode(), _dumped(value))
    return buffer.getvalue()


def _npy(path, rng):
    """Of pickled objects, as the original's dump has them."""
    content = np.load(path, allow_pickle=True)
    return _dumped(change(content.item() if content.shape == () else content, rng))


def _record(path, rng):
    packed = np.load(path)
    content = change({name: packed[name] for name in packed.dtype.names}, rng)
    if not isinstance(content, dict):
        return _dumped(content)
    content = {name: np.asarray("" if isinstance(value, list | tuple | dict | type(None) | bytes) else value)
               for name, value in content.items() if name}
    content = {name: value.astype("U9") if value.dtype.hasobject else value for name, value in content.items()}
    packed = np.zeros(rng.choice([()] * 20 + [(1,), (0,), (2,)]),
                      [(name, value.dtype, value.shape) for name, value in content.items()])
    for name, value in content.items():
        packed[name] = value
    return _dumped(packed)


def _pickle(path, rng):
    content = change(pickle.loads(Path(path).read_bytes()), rng)
    if rng.random() < 0.1:
        content = rng.choice([os.getcwd, Path("x"), {1, 2}, 3j, np.dtype("f4,i4")])
    return pickle.dumps(content, protocol=rng.randrange(6))


def _pth(path, rng):
    buffer = io.BytesIO()
    torch.save(change(torch.load(path, weights_only=False), rng), buffer,
               _use_new_zipfile_serialization=rng.random() < 0.5)
    return buffer.getvalue()


def _json(path, rng):
    content = change(json.loads(Path(path).read_text()), rng)
    return json.dumps(content, default=str).encode(rng.choice(["utf-8"] * 8 + ["utf-16", "utf-8-sig"]))


def _jsonl(path, rng):
    lines = Path(path).read_text().splitlines()
    k = rng.randrange(len(lines))
    lines[k] = json.dumps(change(json.loads(lines[k]), rng), default=str)
    return ("\n".join(lines) + "\n").encode()


def _yaml(path, rng):
    content = yaml.safe_load(Path(path).read_text())
    if rng.random() < 0.1:
        bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
            f"{n}: &{n} [{', '.join([f'*{m}'] * 9)}]\n" for m, n in zip("abcdefgh", "bcdefghi"))
        return f"{bomb}{rng.choice(list(content))}: *i\n".encode()
    return json.dumps(change(content, rng), default=str).encode()  # which is YAML, less NaN


def _text(path, rng):
    lines = [line.split(" ") for line in Path(path).read_text().splitlines()]
    k, way = rng.randrange(len(lines)), rng.random()
    line = lines[k]
    place = rng.randrange(len(line))
    if way < 0.1:
        del lines[k]
    elif way < 0.2:
        lines.insert(k, rng.choice(lines))
    elif way < 0.3:
        del line[place]
    elif way < 0.4:
        line.insert(place, rng.choice([*TEXTS, *map(str, NUMBERS)]))
    elif way < 0.7:
        line[place] = str(rng.choice(NUMBERS))
    else:
        line[place] = odd_text(line[place], rng)
    text = "\n".join(" ".join(line) for line in lines) + rng.choice(["\n", "", "\n\n"])
    encoding = rng.choice(["utf-8"] * 6 + ["utf-16", "utf-8-sig", "latin-1"])
    return text.encode(encoding, "surrogateescape" if encoding == "utf-8" else "replace")


def _hdf5(path, rng):
    def read(group):
        return {name: read(item) if isinstance(item, h5py.Group) else item[()] for name, item in group.items()}

    with h5py.File(path, "r") as file:
        content = read(file)
    if rng.random() < 0.35:
        level, name = content, rng.choice(list(content))
        while rng.random() < 0.95 and isinstance(level[name], dict) and level[name]:
            level, name = level[name], rng.choice(list(level[name]))
        level[name] = rng.choice(ODD_ITEMS)
    else:
        content = change(content, rng)
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        _write_hdf5(file, content if isinstance(content, dict) else {"depth": content}, rng)
    return buffer.getvalue()


def _write_hdf5(group, content, rng):
    for name, value in content.items():
        name = name.replace("\0", "0").encode(errors="replace").decode().strip("./ ") or "unnamed"
        if isinstance(value, dict):
            _write_hdf5(group.require_group(name), value, rng)
        elif callable(value):
            value(group, name)
        else:
            try:
                packed = {"compression": "gzip"} if np.ndim(value) and np.size(value) and rng.random() < 0.5 else {}
                group.create_dataset(name, data=value, **packed)
            except (TypeError, ValueError, OverflowError):  # HDF5 cannot hold it
                group.create_dataset(name, data=str(type(value)))


def _virtual(group, name):
    layout = h5py.VirtualLayout((100, 3), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "depth", (100, 3))
    group.create_virtual_dataset(name, layout)


def _assigned(value):
    return lambda group, name: group.__setitem__(name, value)


def _dataset(*arguments, **options):
    return lambda group, name: group.create_dataset(name, *arguments, **options)


# what only HDF5 can hold: links, datasets that claim more than there is or lie elsewhere, and odd types
ODD_ITEMS = [
    _assigned(h5py.ExternalLink("other.h5", "/depth")), _assigned(h5py.SoftLink("/nowhere")),
    lambda group, name: group.__setitem__(name, group), _assigned(np.dtype("f4")), h5py.Group.create_group, _virtual,
    _dataset((100,), "f4", external=[("/etc/passwd", 0, 400)]), _dataset((2 ** 40, 3), "f8", chunks=(2 ** 10, 3)),
    _dataset((2 ** 14, 2 ** 13), "f4", chunks=(2 ** 14, 2 ** 13), compression="gzip"), _dataset(data=h5py.Empty("f4")),
    _dataset(data=np.zeros((3, 3), "f4,i4")), _dataset(data=["a", "b" * 1000], dtype=h5py.string_dtype()),
    lambda group, name: group.create_dataset(name, data=group.ref, dtype=h5py.ref_dtype)]
FORMATS = {"npz": _npz, "npy": _npy, "record": _record, "pkl": _pickle, "pth": _pth, "json": _json, "jsonl": _jsonl,
           "yaml": _yaml, "text": _text, "hdf5": _hdf5}


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes with one to four places changed, most often near the head, where what the rest means is written."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        size = len(data)
        place = min(rng.choice([rng.randrange(size + 1), rng.randrange(min(size, 400) + 1),
                                max(size - 1 - rng.randrange(200), 0)]), size)
        n, way = rng.choice([1, 2, 4, 8, 64, 1000]), rng.randrange(9)
        if way < 2 and place < size:
            data[place] ^= 1 << rng.randrange(8)
        elif way == 2:
            data[place:place + n] = rng.randbytes(min(n, 8))
        elif way == 3:
            data[place:place + n] = bytes([rng.choice([0, 255, 127])]) * min(n, size - place)
        elif way == 4:
            del data[place:(None if rng.random() < 0.5 else place + n)]
        elif way == 5:
            data[place:place] = data[place:place + n]
        elif way == 6:
            data[place:place] = rng.randbytes(n)
        elif way == 7:
            head = rng.choice(HEADS)
            data[:rng.choice([0, len(head)])] = head
        else:
            value = rng.choice([0, 1, 2 ** 31 - 1, 2 ** 32 - 1, 2 ** 63, 2 ** 64 - 1, 2 ** 40, 10 ** 5])
            side = rng.choice([4, 8])
            data[place:place + side] = (value % 2 ** (8 * side)).to_bytes(side, rng.choice(["little", "big"]))
        if rng.random() < 0.01:
            data.clear()
    return bytes(data)


def replace_by_other(path: Path, rng: random.Random) -> None:
    """Something that is no regular file, or nothing, in the place of a file."""
    moved = path.with_name(f"moved{path.suffix}")
    way = rng.choice(["pipe", "folder", "empty", "nothing", "nowhere", path.name, "/dev/zero", moved.name])
    path.replace(moved)
    if way == "pipe":
        os.mkfifo(path)
    elif way == "folder":
        path.mkdir()
    elif way == "empty":
        path.touch()
    elif way != "nothing":
        path.symlink_to(way)
    if way != moved.name:
        moved.unlink()


def mutate(path: Path, form: str | None, rng: random.Random) -> str:
    """Change the file at `path`, which is of one of FORMATS or None; returns what was done."""
    way = rng.random()
    if way < 0.05:
        replace_by_other(path, rng)
        return "another kind of file"
    if way < 0.12:
        donor = rng.choice([other for other in path.parent.rglob("*") if other.is_file()])
        if donor != path:
            shutil.copyfile(donor, path)
            return f"the content of {donor.name}"
    if form is None or way < 0.5:
        path.write_bytes(change_bytes(path.read_bytes(), rng))
        return "bytes"
    try:
        data = FORMATS[form](path, rng)
    except Exception:  # a format cannot hold everything
        data = change_bytes(path.read_bytes(), rng)
    path.write_bytes(data)
    return f"a field, as {form}"
