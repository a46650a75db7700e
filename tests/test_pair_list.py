"""Pair lists: every form of a line that is allowed, and lines that are not."""
from pathlib import Path

import numpy as np
import pytest

from tools.cli import InputError
from tools.pair_list import Pair, read_pair_list, write_pair_list

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
K0 = np.array([[500.25, 0, 320], [0, 501, 240], [0, 0, 1]])
K1 = np.array([[1 / 3 + 600, 0, 311.5], [0, 600, 200], [0, 0, 1]])
T = np.array([[0, -1, 0, 0.1], [1, 0, 0, -1e-7], [0, 0, 1, 85661.74428579654], [0, 0, 0, 1.0]])


def text(*matrices):
    return " ".join(f"{value:g}" for matrix in matrices for value in matrix.ravel())


def read_text(tmp_path, content):
    path = tmp_path / "pairs.txt"
    path.write_text(content)
    return read_pair_list(path)


def test_every_shape_reads(tmp_path):
    pairs = read_text(tmp_path, "\n".join([
        "# a comment", "a/0.jpg b/1.jpg", "", "  a.jpg\tb.jpg 3  1 ",
        f"a.jpg b.jpg 0 2 {text(K0, np.eye(3))}", f"a.jpg b.jpg 1 0 {text(K0, np.eye(3), T)}"]))
    assert [(pair.image0, pair.image1, pair.rot0, pair.rot1) for pair in pairs] == [
        ("a/0.jpg", "b/1.jpg", 0, 0), ("a.jpg", "b.jpg", 3, 1), ("a.jpg", "b.jpg", 0, 2), ("a.jpg", "b.jpg", 1, 0)]
    assert pairs[0].K0 is pairs[0].K1 is pairs[0].T_0to1 is pairs[1].K0 is pairs[2].T_0to1 is None
    assert np.array_equal(pairs[2].K0, K0) and np.array_equal(pairs[2].K1, np.eye(3))
    assert np.array_equal(pairs[3].K0, K0) and np.array_equal(pairs[3].K1, np.eye(3))
    np.testing.assert_allclose(pairs[3].T_0to1, T, rtol=1e-5)


def test_what_is_written_reads_back_the_same(tmp_path):
    pairs = [Pair("a.jpg", "b.jpg"), Pair("a.jpg", "b.jpg", 0, 3), Pair("a", "b", 1, 2, K0, K1),
             Pair("a", "b", K0=K0, K1=K1, T_0to1=T)]
    path = tmp_path / "new" / "pairs.txt"
    write_pair_list(path, pairs)
    assert [len(line.split()) for line in path.read_text().splitlines()] == [2, 4, 22, 38]
    for pair, back in zip(pairs, read_pair_list(path), strict=True):
        assert (pair.image0, pair.image1, pair.rot0, pair.rot1) == (back.image0, back.image1, back.rot0, back.rot1)
        for name in ("K0", "K1", "T_0to1"):
            assert np.array_equal(getattr(pair, name), getattr(back, name)), name
    assert [file.name for file in path.parent.iterdir()] == ["pairs.txt"]


@pytest.mark.parametrize("pair", [
    Pair("a b.jpg", "c.jpg"), Pair("a.jpg", ""), Pair("#a.jpg", "b.jpg"), Pair("a", "b", K0=K0), Pair("a", "b", K1=K1),
    Pair("a", "b", T_0to1=T)])
def test_a_pair_the_format_cannot_hold_leaves_the_file_alone(tmp_path, pair):
    path = tmp_path / "pairs.txt"
    path.write_text("a.jpg b.jpg\n")
    with pytest.raises(ValueError):
        write_pair_list(path, [Pair("c.jpg", "d.jpg"), pair])
    assert path.read_text() == "a.jpg b.jpg\n" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("line, message", [
    ("a.jpg", "1 values; expected `image0 image1`"),
    ("a.jpg b.jpg 0", "3 values"),
    (f"a.jpg b.jpg {text(K0, K1)}", "20 values"),
    (f"a.jpg b.jpg 0 0 {text(T)}", "20 values"),
    (f"a.jpg b.jpg 0 0 {text(K0, K1, T)} 1", "39 values"),
    ("a.jpg b.jpg 0 4", "`0 4` where rot0 rot1 belong"),
    ("a.jpg b.jpg 1.0 0", "`1.0 0` where rot0 rot1 belong"),
    ("a.jpg b.jpg c.jpg d.jpg", "where rot0 rot1 belong"),
    (f"a.jpg b.jpg 0 0 {text(K0, K1, T).replace('320', '32O')}", "'32O'"),
    (f"a.jpg b.jpg 0 0 {text(K0, K1, T).replace('320', 'nan')}", "nan or inf"),
    (f"a.jpg b.jpg 0 0 {text(K0, K1.T)}", "K1 is not a camera matrix"),
    (f"a.jpg b.jpg 0 0 {text(-K0, K1)}", "K0 is not a camera matrix"),
    (f"a.jpg b.jpg 0 0 {text(K0, K1, T.T)}", "T_0to1 is not a rigid motion"),
    (f"a.jpg b.jpg 0 0 {text(K0, K1, T * [[1], [1], [-1], [1]])}", "T_0to1 is not a rigid motion"),
])
def test_malformed_line_is_named(tmp_path, line, message):
    with pytest.raises(InputError) as error:
        read_text(tmp_path, f"# comment\n\na.jpg b.jpg\n{line}\n")
    assert "pairs.txt, line 4: " in str(error.value) and message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_empty_and_binary_files(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.txt"):
        read_pair_list(tmp_path / "nowhere.txt")
    with pytest.raises(InputError, match="holds no pairs"):
        read_text(tmp_path, "# nothing\n\n")
    (tmp_path / "image.txt").write_bytes(b"\xff\xd8\xff\xe0\x00")
    with pytest.raises(InputError, match=r"image\.txt"):
        read_pair_list(tmp_path / "image.txt")


@pytest.mark.parametrize("name, n_pairs, n_turned", [
    ("lists/yfcc_test_pairs_with_gt.txt", 4000, None), ("lists/scannet_test_pairs_with_gt.txt", 1500, 0),
    ("scannet15/pairs_with_gt.txt", 15, 0)])
def test_published_lists(name, n_pairs, n_turned):
    if not (DATA / name).is_file():
        pytest.skip(f"needs {name} of the shared data folder beside the repository")
    pairs = read_pair_list(DATA / name)
    assert len(pairs) == n_pairs
    assert all(pair.T_0to1 is not None for pair in pairs)
    turned = sum((pair.rot0, pair.rot1) != (0, 0) for pair in pairs)
    assert turned == n_turned if n_turned is not None else turned > 0
