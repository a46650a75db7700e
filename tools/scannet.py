"""ScanNet as SGMNet packs it: <scene>/{img/N.jpg, intrinsic/N.txt, extrinsic/N.txt}."""
import re
from pathlib import PurePosixPath

import numpy as np

from tools.cli import InputError
from tools.files import below, read_matrix
from tools.geometry import is_camera_matrix, is_rigid


def packed_name(name: str) -> str:
    """An image's name in that packaging: `scans_test/scene0707_00/sens/frame-000015.color.jpg`, ScanNet's own, is
    `scene0707_00/img/15.jpg`; any other name is as it is."""
    original = re.fullmatch(r"(?:.*/)?(scene\d+_\d+)/sens/frame-(\d+)\.color\.jpg", name)
    return f"{original[1]}/img/{original[2].lstrip('0') or 0}.jpg" if original else name


def beside(name: str, folder: str, suffix: str) -> str:
    """What belongs to the image <scene>/img/<N>.jpg in another folder of its scene: <scene>/<folder>/<N><suffix>."""
    path = PurePosixPath(name)
    return str(path.parent.parent / folder / (path.stem + suffix))


def usable_camera(K: np.ndarray, pose: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
    """K (3, 3) and pose (4, 4) as they are; InputError that names the files `where` if they cannot be used."""
    if not (is_camera_matrix(K) and is_rigid(pose)):
        raise InputError(f"camera not usable: {where}")
    return K, pose


def read_scannet_camera(root, name: str) -> tuple[np.ndarray, np.ndarray]:
    """K (3, 3) and world-to-camera pose (4, 4) of the image root/<scene>/img/<N>.jpg; InputError if unusable."""
    intrinsic, extrinsic = (below(root, beside(name, folder, ".txt")) for folder in ("intrinsic", "extrinsic"))
    K, pose = usable_camera(read_matrix(intrinsic, 3, 4)[:3, :3], read_matrix(extrinsic, 4), f"{intrinsic} {extrinsic}")
    return K, np.linalg.inv(pose)
