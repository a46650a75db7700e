"""Pair lists with ground truth, in SuperGlue's text format: one pair a line."""
from dataclasses import dataclass

import numpy as np

from tools.cli import InputError
from tools.files import find_shipped, read_text, write_bytes
from tools.geometry import is_camera_matrix, is_rigid

EXPECTED = ("expected `image0 image1`, then nothing, or `rot0 rot1` (2 values), or these and `K0 K1` (20 values), "
            "or these and `T_0to1` (36 values)")


@dataclass
class Pair:
    """Two images, and what is known of their cameras.

    image0, image1: names, relative to a folder that the list does not name. rot0, rot1: how many times 90 degrees
    counter-clockwise to turn each image (`np.rot90`), and with it its K and pose, to stand upright. K0, K1: (3, 3)
    for the images as stored (ignoring EXIF and rot), OpenCV's pixel convention, or both None. T_0to1: (4, 4), or None.
    """
    image0: str
    image1: str
    rot0: int = 0
    rot1: int = 0
    K0: np.ndarray | None = None
    K1: np.ndarray | None = None
    T_0to1: np.ndarray | None = None


def read_pair_list(path) -> list[Pair]:
    """Read a pair list; empty lines and lines that start with # are left out.

    InputError if it cannot be read, holds no pair, or has a malformed line, which it names.
    """
    pairs = []
    for number, line in enumerate(read_text(find_shipped(path, "assets")).splitlines(), start=1):
        tokens = line.split()
        if tokens and not tokens[0].startswith("#"):
            try:
                pairs.append(_parse(tokens))
            except ValueError as error:
                raise InputError(f"{path}, line {number}: {error}") from None
    if not pairs:
        raise InputError(f"{path} holds no pairs: {EXPECTED}, one pair a line")
    return pairs


def write_pair_list(path, pairs: list[Pair]) -> None:
    """Write a pair list, atomically; numbers are written so that they read back the same.

    ValueError for a pair that the format cannot hold: a name that is empty, contains white space or would start a
    comment, one K without the other, or T_0to1 without K.
    """
    write_bytes(path, "".join(" ".join(_tokens(pair)) + "\n" for pair in pairs).encode())


def _parse(tokens: list[str]) -> Pair:
    """One line's tokens -> Pair; ValueError says what is wrong with them."""
    names, turns = tokens[:2], tokens[2:4]
    if len(tokens) not in (2, 4, 22, 38):
        raise ValueError(f"{len(tokens)} values; {EXPECTED}")
    if not all(turn in ("0", "1", "2", "3") for turn in turns):
        raise ValueError(f"`{' '.join(turns)}` where rot0 rot1 belong; each is 0, 1, 2 or 3")
    try:
        numbers = np.array(tokens[4:], dtype=np.float64)
    except ValueError as error:
        raise ValueError(f"{error} among K0 K1 T_0to1; all are numbers") from None
    if not (np.abs(numbers) < 1e12).all():  # nor nan
        raise ValueError("nan or inf, or more than 1e12, among K0 K1 T_0to1; all are finite numbers")
    pair = Pair(*names, *map(int, turns))
    if len(numbers):
        pair.K0, pair.K1 = numbers[:18].reshape(2, 3, 3)
        for name, K in (("K0", pair.K0), ("K1", pair.K1)):
            if not is_camera_matrix(K):
                raise ValueError(f"{name} is not a camera matrix; expected fx 0 cx 0 fy cy 0 0 1 with fx, fy > 0")
    if len(numbers) > 18:
        pair.T_0to1 = numbers[18:].reshape(4, 4)
        if not is_rigid(pair.T_0to1):
            raise ValueError("T_0to1 is not a rigid motion; expected R t over 0 0 0 1, row by row, R a rotation")
    return pair


def _tokens(pair: Pair) -> list[str]:
    names = [pair.image0, pair.image1]
    if any(name.split() != [name] for name in names) or names[0].startswith("#"):
        raise ValueError(f"a pair list cannot hold the names {names}: white space separates values, # starts a comment")
    if (pair.K0 is None) != (pair.K1 is None) or (pair.K0 is None and pair.T_0to1 is not None):
        raise ValueError(f"a pair list holds both K or none, and T_0to1 only after them: {pair.image0} {pair.image1}")
    turns = [] if pair.K0 is None and pair.rot0 == pair.rot1 == 0 else [str(pair.rot0), str(pair.rot1)]
    matrices = [matrix for matrix in (pair.K0, pair.K1, pair.T_0to1) if matrix is not None]
    return names + turns + [repr(float(value)) for matrix in matrices for value in np.ravel(matrix)]
