"""Cameras in text files, and whether what is said of a camera can be true."""
import numpy as np

from tools.cli import InputError
from tools.files import read_text


def read_matrix(path, *sides: int) -> np.ndarray:
    """n x n numbers of a text file, n one of `sides`, (n, n) float64, nan and inf included; InputError if it holds
    anything else."""
    try:
        values = np.array(read_text(path).split(), dtype=np.float64)
    except ValueError:
        values = np.zeros(0)
    for n in sides:
        if len(values) == n * n:
            return values.reshape(n, n)
    raise InputError(f"{path} does not hold {' or '.join(f'{n}x{n}' for n in sides)} numbers")


def is_camera_matrix(K: np.ndarray) -> bool:
    """Whether (3, 3) is finite, with positive focal lengths and the last row 0, 0, 1."""
    return bool(np.isfinite(K).all() and K[0, 0] > 0 and K[1, 1] > 0 and np.array_equal(K[2], [0, 0, 1]))


def is_rigid(pose: np.ndarray) -> bool:
    """Whether (4, 4) is a rotation and a translation, to the precision of a text file."""
    R = pose[:3, :3]
    return bool(np.isfinite(pose).all() and np.allclose(R @ R.T, np.eye(3), atol=1e-2) and np.linalg.det(R) > 0
                and np.allclose(pose[3], [0, 0, 0, 1]))
