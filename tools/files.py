"""Files that appear whole or not at all, and the few formats that every step reads."""
import contextlib
import hashlib
import json
import os
import re
from pathlib import Path

import cv2
import h5py
import numpy as np

from tools.cli import InputError


@contextlib.contextmanager
def atomic_path(path):
    """Yield a path beside `path` to write to; it takes `path`'s name when the block ends without an error.

    The temporary name keeps the suffix, because some writers choose the format by it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_strays(folder) -> None:
    """Delete what `atomic_path` left in a folder when its process was killed."""
    for path in Path(folder).glob(".*.tmp*"):
        pid = re.fullmatch(r"\..+\.(\d+)\.tmp(\.\w+)?", path.name)
        # in a container, a process that is started again often has the number that it had
        if pid and (int(pid[1]) == os.getpid() or not _is_running(int(pid[1]))):
            path.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is somebody else's
        pass
    return True


def file_hash(path) -> str:
    """Short SHA-256 of a file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def check_folder(path) -> None:
    """InputError if `path` cannot be a folder to write to, because it or a folder above it is a file."""
    path = Path(path).absolute()
    there = next(part for part in (path, *path.parents) if part.exists())
    if not there.is_dir():
        raise InputError(f"{there} is a file, not a folder to write to")


def write_json(path, content) -> None:
    """Write `content` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def read_json(path):
    """Read a JSON file; InputError names the file when it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None


def read_lines(path) -> list[str]:
    """Non-empty lines of a text file, stripped; lines that start with # are left out."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def read_image(path, color: bool = False) -> np.ndarray:
    """Read an image as stored, that is, ignoring EXIF orientation: every K of SPEC 1 is for the stored image.

    Returns uint8 (H, W), or (H, W, 3) in BGR order with `color`. InputError if it cannot be decoded.
    """
    flag = cv2.IMREAD_COLOR if color else cv2.IMREAD_GRAYSCALE
    if not Path(path).is_file():
        raise InputError(f"image not found: {path}")
    image = cv2.imread(str(path), flag | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        raise InputError(f"not a readable image: {path}")
    return image


def write_image(path, image: np.ndarray, quality: int = 95) -> None:
    """Write a BGR or gray image, atomically; the format follows the suffix, quality is JPEG's."""
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if Path(path).suffix in (".jpg", ".jpeg") else []
    with atomic_path(path) as temporary:
        if not cv2.imwrite(str(temporary), image, options):
            raise InputError(f"cannot write image {path}")


def read_depth(path) -> np.ndarray:
    """Depth map (H, W) float32, 0 = unknown: MegaDepth's HDF5, or a 16-bit PNG in millimetres (returned in metres).

    65535 in a PNG is unknown too; so is anything negative or not finite.
    """
    if not Path(path).is_file():
        raise InputError(f"depth map not found: {path}")
    if Path(path).suffix == ".png":
        stored = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        if stored is None or stored.ndim != 2 or stored.dtype != np.uint16:
            raise InputError(f"not a 16-bit depth PNG: {path}")
        return np.where(stored == 65535, 0, stored).astype(np.float32) / 1000
    try:
        with h5py.File(path, "r") as file:
            depth = file["depth"][()].astype(np.float32)
    except (OSError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"not a depth map (HDF5 with a dataset 'depth'): {path} ({error})") from None
    return np.where(np.isfinite(depth) & (depth > 0), depth, 0).astype(np.float32)


def write_depth(path, depth: np.ndarray) -> None:
    """Write a depth map (H, W) as MegaDepth does: HDF5, dataset "depth", float32."""
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        file.create_dataset("depth", data=depth.astype(np.float32), compression="lzf")
