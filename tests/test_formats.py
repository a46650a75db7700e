"""docs/formats.md says what the code writes."""
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from eval.image_matches import ImageMatches
from tools.manifest import SCENE_FIELDS
from tools.records import KEYPOINT_FIELDS, MATCH_FIELDS
from training.state import ENTRIES

TEXT = (Path(__file__).parent.parent / "docs" / "formats.md").read_text()


def rows_of(title: str) -> dict[str, list[str]]:
    """{name: the other cells of its row} of the table below a title."""
    section = re.split(r"\n#+ ", TEXT.split(title)[1])[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return {name: cells for first, *cells in rows[2:] for name in re.findall(r"`([^`]*)`", first)}


@pytest.mark.parametrize("kind, fields", [("Keypoint", KEYPOINT_FIELDS), ("Match", MATCH_FIELDS)])
def test_records(kind, fields):
    kinds = {"str": "U", "int32": "i", "float64": "f", "float32": "f", "float16": "f"}
    said = rows_of(f"### {kind} record")
    assert list(said) == list(fields)
    for name, field in fields.items():
        assert kinds[said[name][0].split()[0].strip(",")] in field.kinds, name
        assert said[name][1] == str(field.shape).replace("'", ""), name


def test_counts_and_checkpoints():
    assert set(rows_of("### scenes/")) == set(SCENE_FIELDS)
    assert set(rows_of("## Checkpoints")) == {"model", "optimizer", "network", "feature", "version", *ENTRIES}


def test_matches(tmp_path):
    view = SimpleNamespace(name="a", image_size=(4, 3), turns=0, keypoints=np.zeros((2, 2), np.float32),
                           features=SimpleNamespace(scores=np.zeros(2, np.float32)))
    found = ImageMatches(view, view, np.zeros((1, 2), np.int64), np.zeros(1, np.float32), None, None, "", "",
                         np.zeros(1, bool))
    found.save(tmp_path / "a.npz")
    said = rows_of("## Matches of your own")
    with np.load(tmp_path / "a.npz") as content:
        assert set(content) == set(said)
        for name, array in content.items():
            assert len(re.findall(r"\w+", said[name][1].split(")")[0])) == array.ndim, name
