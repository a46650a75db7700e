"""A few damaged files of each kind (tests/fuzz.py has many): each ends in a result or in one line."""
import os
import subprocess
import sys
from pathlib import Path

import fuzz
import numpy as np
import pytest
from fuzz_kinds import KINDS

from tools import files


def test_damaged_files_end_in_one_line(tmp_path):
    # in a process of its own, as it forks others
    found = subprocess.run([sys.executable, Path(fuzz.__file__), "--inputs", "50", "--workers", "2", "--keep",
                            tmp_path],
                           env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.fixture
def depth_map(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    KINDS["depth_maps"].make()
    return tmp_path


def test_what_a_failure_is(depth_map, monkeypatch):
    use = KINDS["depth_maps"].use
    assert fuzz.attempt(use, depth_map) == []
    (depth_map / "depth.png").write_bytes(b"")
    assert fuzz.attempt(use, depth_map) == []  # refused in one line

    def fail(*_):
        return np.zeros(1)[3]

    monkeypatch.setattr(files, "_decode", fail)
    monkeypatch.setattr(files, "header_size", lambda path: (1, 1))
    (failure,) = fuzz.attempt(use, depth_map)
    assert failure.cause == "IndexError" and failure.place.startswith("tools/files.py:")


ODD = """
import os, zlib
from pathlib import Path
import fuzz

def use():
    path = Path("depth.png")
    way = zlib.crc32(path.read_bytes()) % 3 if path.is_file() and not path.is_symlink() else 2
    if way == 0:
        os.abort()
    while way == 1:
        pass

fuzz.HANG = 2
fuzz.KINDS["odd"] = fuzz.KINDS["depth_maps"]._replace(use=use, files={"depth.png": None})
table = fuzz.fuzz(["odd"], 7)
print(table.inputs["odd"], sorted({cause for cause, _ in table.causes}))
"""


def test_a_death_and_a_hang_are_told_and_the_rest_is_done():
    # in a process of its own, as a fork takes no threads along
    found = subprocess.run([sys.executable, "-c", ODD], cwd=Path(fuzz.__file__).parent, capture_output=True, text=True)
    assert found.stdout.split("\n")[-2] == "7 ['SIGABRT', 'hang']", found.stdout + found.stderr
