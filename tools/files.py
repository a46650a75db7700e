"""Files that appear whole or not at all, and the few formats that every step reads."""
import codecs
import contextlib
import hashlib
import json
import math
import os
import re
import stat
import struct
import tempfile
import uuid
import warnings
from pathlib import Path, PureWindowsPath

import cv2
import h5py
import numpy as np
from PIL import Image

from imp_matching import shipped
from tools.cli import InputError, OutputError, describe_error

MAX_PIXELS = 2 ** 28  # of an image or depth map, by its header
# what OpenCV may read, and .heic, which telephones write: better named as skipped than left out without a word
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".png", ".tif", ".tiff", ".bmp", ".dib", ".webp", ".avif", ".jp2", ".gif",
                  ".ppm", ".pgm", ".pbm", ".pnm", ".pam", ".pfm", ".ras", ".sr", ".hdr", ".exr", ".heic", ".heif"}
FLOAT_SUFFIXES = (".exr", ".pfm", ".tif", ".tiff")
MAX_COMPRESSION = 1100  # of HDF5's filters: deflate reaches 1032
SMALL_BYTES = 2 ** 24  # may be asked for whatever a file's size
Image.MAX_IMAGE_PIXELS = None  # ours is checked instead
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # what is wrong with a file is said once, by us


@contextlib.contextmanager
def atomic_path(path):
    """Yield a path beside `path` to write to; it takes `path`'s name when the block ends without an error.

    The temporary name keeps the suffix, because some writers choose the format by it. A link at `path` is replaced.
    What the system refuses is an OutputError that names `path`.
    """
    path = Path(path)
    stem = os.fsdecode(os.fsencode(path.stem)[:200])  # file systems allow 255 bytes
    temporary = path.with_name(f".{stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # else a power cut may leave the name with no content
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def remove_strays(folder) -> None:
    """Delete what `atomic_path` left in a folder when its process was killed."""
    for path in Path(folder).glob(".*.tmp*"):
        match = re.fullmatch(r"\..+\.(\d+)\.tmp(\.\w+)?", path.name)
        # in a container, a process that is started again often has the number that it had
        if match and (int(match[1]) == os.getpid() or not _is_running(int(match[1]))):
            path.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    if os.name == "nt":  # os.kill would send it Ctrl-C
        return True
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)  # PermissionError: it is somebody else's
    return True


def file_hash(path) -> str:
    """Short SHA-256 of a file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def check_file(path, name: str = "file") -> None:
    """InputError unless `path` is a regular file, or a link to one: a FIFO or device is never opened."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{name} not found: {path}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {name} {str(path)[:200]!r}: {getattr(error, 'strerror', error)}") from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} is {'a folder' if stat.S_ISDIR(mode) else 'a device or pipe'}, not a {name}")


def below(folder, name) -> Path:
    """folder / name, for a name that was read from data; InputError if it leads out of the folder."""
    name = str(name)
    parts = PureWindowsPath(name)  # knows both kinds of slash, and drives
    if not name or "\0" in name or parts.drive or parts.root or ".." in parts.parts:
        raise InputError(f"name {name[:200]!r} is refused: it must lie below its folder")
    return Path(folder, name)


def check_folder(path) -> None:
    """OutputError if `path` cannot be a folder that files are written to; it is left as it was, there or not."""
    path = Path(path).absolute()
    there = next(part for part in (path, *path.parents) if part.exists())
    if not there.is_dir():
        raise InputError(f"{there} is a file, not a folder to write to")
    try:
        # not by making the folder and removing it: another process may be about to write there
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise OutputError(error.errno, error.strerror, str(path)) from None


def write_bytes(path, data: bytes) -> None:
    """Write a file, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path, content) -> None:
    """Write `content` as indented JSON, atomically."""
    write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def read_bytes(path) -> bytes:
    """The content of a regular file; else InputError."""
    check_file(path)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def read_text(path) -> str:
    """Text as editors save it: UTF-8 with or without a BOM, UTF-16 with one, or Latin-1; else InputError."""
    data = read_bytes(path)
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    for encoding in ("utf-16",) if utf16 else ("utf-8-sig", "latin-1"):
        with contextlib.suppress(UnicodeDecodeError):
            text = data.decode(encoding)
            if "\0" not in text:
                return text.replace("\r\n", "\n").replace("\r", "\n")
    raise InputError(f"cannot read {path}: it is not a text file")


def _unique(pairs: list[tuple]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        name = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise ValueError(f"key {name!r} is there twice")
    return content


def read_json(path):
    """Read a JSON file; InputError names the file when it is missing or not JSON, or has a key twice."""
    try:
        return json.loads(read_text(path), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None


def find_shipped(path, kind: str) -> Path:
    """A file as named; where NAME or `kind`/NAME is not there, the one of that name in ./`kind`, or that ships."""
    path = Path(path)
    if path.parent not in (Path(), Path(kind)) or path.exists():
        return path
    return next((own for own in (Path(kind, path.name), shipped(kind) / path.name) if own.is_file()), path)


def read_lines(path) -> list[str]:
    """Non-empty lines of a text file, or of one of the assets, stripped; lines that start with # are left out."""
    lines = (line.strip() for line in read_text(find_shipped(path, "assets")).splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def read_matrix(path, *sides: int) -> np.ndarray:
    """n x n numbers of a text file, n one of `sides`, (n, n) float64, nan and inf included; InputError if it holds
    anything else."""
    words = read_text(path).split()
    with contextlib.suppress(ValueError):
        for n in sides:
            if len(words) == n * n:
                return np.array(words, np.float64).reshape(n, n)
    raise InputError(f"{path} does not hold {' or '.join(f'{n}x{n}' for n in sides)} numbers")


def header_size(path) -> tuple[int, int] | None:
    """(w, h) of an image file by its header, as stored; None where that is not known without decoding it."""
    try:
        check_file(path, "image")
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            return image.size
    except Exception:  # whatever a damaged file makes of Pillow's readers: OpenCV decides then
        return None


def read_image(path, color: bool = False) -> np.ndarray:
    """Read an image as stored, that is, ignoring EXIF orientation: every K is for the stored image.

    Returns uint8 (H, W), or (H, W, 3) in BGR order with `color`, whatever bit depth is stored; floating-point images
    are scaled by their largest value. InputError if it cannot be decoded, or has more than MAX_PIXELS.
    """
    check_file(path, "image")
    size = header_size(path)
    if size and size[0] * size[1] > MAX_PIXELS:
        raise InputError(f"image {path} is too large: {size[0]}x{size[1]}, at most {MAX_PIXELS / 1e6:.0f} megapixels")
    if _is_cut_off(path):
        raise InputError(f"image {path} is incomplete: get it again")
    if Path(path).suffix.lower() in FLOAT_SUFFIXES:  # OpenCV would cut them to whole numbers
        image = _decode(path, cv2.IMREAD_UNCHANGED)
        if image is not None and image.dtype.kind == "f" and image.shape[2:] in ((), (3,), (4,)):
            image = np.clip(np.nan_to_num(image, posinf=0), 0, 1e38).astype(np.float32)
            image = np.clip(image * (255 / max(image.max(initial=0), 1e-30)), 0, 255).astype(np.uint8)
            image = np.dstack([image] * 3) if image.ndim == 2 else image[:, :, :3].copy()
            return image if color else cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    image = _decode(path, cv2.IMREAD_COLOR if color else cv2.IMREAD_GRAYSCALE)
    if image is None:
        raise InputError(f"not a readable image: {path}")
    return image


def _is_cut_off(path) -> bool:
    """Whether a JPEG ends before its last pixel: OpenCV makes the rest gray."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=("JPEG",)) as image:
            image.draft("L", (1, 1))  # an eighth of the size takes half of the time
            image.load()
    except OSError as error:
        return "truncated" in str(error)
    except Exception:  # whatever a damaged file makes of Pillow's readers: OpenCV decides then
        pass
    return False


def _decode(path, flag: int) -> np.ndarray | None:
    try:
        return cv2.imread(str(path), flag | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        return None


def write_image(path, image: np.ndarray, quality: int = 95) -> None:
    """Write a BGR or gray image, atomically; the format follows the suffix, quality is JPEG's."""
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if Path(path).suffix in (".jpg", ".jpeg") else []
    write_bytes(path, cv2.imencode(Path(path).suffix, image, options)[1])  # imwrite does not say when a disk is full


def read_depth(path) -> np.ndarray:
    """Depth map (H, W) float32, 0 = unknown: MegaDepth's HDF5, or a 16-bit PNG in millimetres (returned in metres).

    65535 in a PNG is unknown too; so is anything negative or not finite.
    """
    check_file(path, "depth map")
    if Path(path).suffix.lower() == ".png":
        size = header_size(path)
        stored = _decode(path, cv2.IMREAD_UNCHANGED) if size and size[0] * size[1] <= MAX_PIXELS else None
        if stored is None or stored.ndim != 2 or stored.dtype != np.uint16:
            raise InputError(f"not a 16-bit depth PNG: {path}")
        return np.where(stored == 65535, 0, stored).astype(np.float32) / 1000
    try:
        with open_hdf5(path) as file, np.errstate(over="ignore"):
            depth = hdf5_array(file, "depth", (None, None)).astype(np.float32)
    except InputError as error:
        raise InputError(f"not a depth map (HDF5 with a dataset 'depth'): {path} ({error})") from None
    return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(0))


@contextlib.contextmanager
def damaged(message: str, after: str = ""):
    """Whatever a damaged file makes of its reader inside the block becomes an InputError: the message, why, `after`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{message}: {describe_error(error)}{after}") from None


@contextlib.contextmanager
def open_hdf5(path):
    """An HDF5 file to read; whatever goes wrong with it inside the block is an InputError that names it."""
    check_file(path)
    with damaged(f"cannot read {path}"), h5py.File(path, "r") as file:
        yield file


def hdf5_item(file, name: str):
    """Dataset or group `name` of an open HDF5 file or group, None if there is none; InputError for a link to elsewhere:
    of links, only hard ones are followed."""
    item = file
    for part in name.strip("/").split("/"):
        link = item.get(part, getlink=True) if isinstance(item, h5py.Group) else None
        if link is None:
            return None
        if not isinstance(link, h5py.HardLink):
            raise InputError(f"{name} of {file.file.filename} is a link to elsewhere")
        item = item[part]
    return item


def hdf5_array(file, name: str, shape: tuple | None = None, kind: str = "fiu") -> np.ndarray:
    """Dataset `name` of an open HDF5 file or group, read as a whole; InputError if it is not as expected.

    shape: None in it stands for any length; kind: `numpy.dtype.kind`s that are admitted. What the header claims is
    checked before memory is taken, and nothing outside the file is read: no links but hard ones, no external storage.
    """
    item, where = _plain_dataset(file, name, kind)
    if shape is not None and (len(shape) != len(item.shape)
                              or any(n not in (None, there) for n, there in zip(shape, item.shape))):
        raise InputError(f"{where} has shape {item.shape}, not {shape}".replace("None", "any"))
    largest = max(SMALL_BYTES, MAX_COMPRESSION * item.id.get_storage_size())
    chunk = math.prod(item.chunks or (1,)) * item.dtype.itemsize
    if item.size > MAX_PIXELS * 4 or max(item.nbytes, chunk) > largest:
        raise InputError(f"{where} claims shape {item.shape}, more than the file holds")
    return item[()]


def hdf5_text(file, name: str) -> str:
    """The string of dataset `name` of an open HDF5 file or group, alone or the only element of an array.

    One of any length is read without the library, which takes memory and walks as a damaged file tells it to: its
    element holds the length, the address of a heap and the number of an object in there.
    """
    item, where = _plain_dataset(file, name, "SO")
    if item.size != 1:
        raise InputError(f"{where} is not one string")
    if item.dtype.kind == "S":
        return os.fsdecode(np.ravel(hdf5_array(file, name, kind="S"))[0])
    place = item.id.get_offset()
    if item.chunks and item.id.get_num_chunks() and not item.id.get_create_plist().get_nfilters():
        place = item.id.get_chunk_info(0).byte_offset
    # whatever a damaged file makes of addresses and lengths
    with (contextlib.suppress(struct.error, OverflowError, ValueError, OSError),
          open(item.file.filename, "rb") as stored):
        if place is not None and h5py.check_string_dtype(item.dtype):
            stored.seek(place)
            length, address, wanted = struct.unpack("<IQI", stored.read(16))
            stored.seek(item.file.userblock_size + address)
            signature, size = struct.unpack("<4s4xQ", stored.read(16))
            heap = stored.read(min(size, SMALL_BYTES)) if signature == b"GCOL" else b""
            place = 0
            while True:  # until an object is not there
                number, n = struct.unpack_from("<H6xQ", heap, place)
                if number == wanted and length <= n <= len(heap) - place - 16:
                    return os.fsdecode(heap[place + 16:place + 16 + length].rstrip(b"\0"))
                place += 16 + (n + 7) // 8 * 8
    raise InputError(f"{where} is damaged, or stored in a way that is not read here")


def _plain_dataset(file, name: str, kind: str) -> tuple[h5py.Dataset, str]:
    item, where = hdf5_item(file, name), f"{name} of {file.file.filename}"
    if item is None:
        raise InputError(f"{where} is missing")
    if not isinstance(item, h5py.Dataset) or item.shape is None or item.external or item.is_virtual:
        raise InputError(f"{where} is not a plain dataset")
    if item.dtype.kind not in kind:
        raise InputError(f"{where} is of type {item.dtype}")
    return item, where


def write_hdf5(path, datasets: dict, **options) -> None:
    """Write arrays by name as an HDF5 file, atomically; options: those of h5py's create_dataset."""
    # made in memory, as h5py cannot recover from a full disk
    with h5py.File(uuid.uuid4().hex, "w", driver="core", backing_store=False) as file:
        for name, values in datasets.items():
            file.create_dataset(name, data=values, **options)
        file.flush()
        write_bytes(path, file.id.get_file_image())


def write_depth(path, depth: np.ndarray) -> None:
    """Write a depth map (H, W) as MegaDepth does: HDF5, dataset "depth", float32."""
    # not lzf: its hash table is not initialised, so what it writes depends on what was in memory
    write_hdf5(path, {"depth": depth.astype(np.float32)}, compression="gzip", compression_opts=1)
