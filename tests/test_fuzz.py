"""A few damaged files of each kind (tests/fuzz.py has many): each ends in a result or in one line."""
import json
import os
import subprocess
import sys
import zlib
from dataclasses import replace

import fuzz
import numpy as np
import pytest
from fuzz_kinds import KINDS

from tools import files


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What this file prints when it runs as a program: not in this process, whose threads a fork would leave locked."""
    return subprocess.run([sys.executable, __file__, tmp_path_factory.mktemp("kept")], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)


def test_damaged_files_end_in_one_line(run):
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_death_and_a_hang_are_told_and_the_rest_is_done(run):
    assert json.loads(run.stdout.splitlines()[0]) == [7, ["SIGABRT", "hang"]]


@pytest.fixture
def depth_map(tmp_path):
    KINDS["depth_maps"].make(tmp_path)
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


def die_or_hang(folder):
    path = folder / "depth.png"
    way = zlib.crc32(path.read_bytes()) % 3 if path.is_file() and not path.is_symlink() else 2
    if way == 0:
        os.abort()
    while way == 1:
        pass


if __name__ == "__main__":
    fuzz.HANG, before = 1, fuzz.HANG
    KINDS["odd"] = replace(KINDS["depth_maps"], use=die_or_hang, files={"depth.png": None})
    table = fuzz.fuzz(["odd"], 7)
    print(json.dumps([table.inputs["odd"], sorted(cause for cause, _ in table.causes)]), flush=True)
    del KINDS["odd"]
    fuzz.HANG = before
    sys.exit(fuzz.main(["--inputs", "50", "--workers", "2", "--keep", sys.argv[1]]))
