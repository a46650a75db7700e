"""The file that lets an interrupted evaluation resume: a line of JSON for each finished pair.

    {"format": "imp-eval-journal", "version": 3, "settings": {...}}       first line: what the results depend on
    {"pair": 17, "results": [{"method": ..., "estimator": ..., "threshold": ..., "seed": ..., "result": {...}},
                              ...], "crc32": ...}
    ...

`pair` is the place in the set, `result` the fields of `eval.results.PairResult`; an error without a pose is Infinity,
as Python's json writes it; `crc32` is of the line without it. A line is written when its pair is finished. A line that
is damaged, or not whole, as an interruption may leave it, is dropped, and its pair is done again.
"""
import contextlib
import errno
import json
import os
import zlib
from pathlib import Path

from tools.cli import InputError, OutputError
from tools.files import check_file
from tools.locks import try_lock
from tools.manifest import check_settings

FORMAT = "imp-eval-journal"
VERSION = 3


class Journal:
    """An open journal. finished: what it held when it was opened, {pair: results as in the format}; n_damaged: lines
    that were dropped.

    settings: what the results depend on, as JSON. Raises InputError if the file holds pairs done with other settings,
    if it is not a journal, or if another process has it open. A link in its place is replaced. To be used in a with
    statement, at whose end it goes if no pair was finished.
    """

    def __init__(self, path, settings: dict):
        self.path = Path(path)
        self.finished, self.n_damaged, self.n_added = {}, 0, 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_symlink():
                self.path.unlink()
            if self.path.exists():
                check_file(self.path, "journal")
            self.file = open(self.path, "a+b", buffering=0)
        except OSError as error:
            raise OutputError(error.errno, error.strerror, str(self.path)) from None
        try:
            if not try_lock(self.file):
                raise InputError(f"another evaluation is writing to {self.path.parent}: wait for it, or name another "
                                 "--save_path")
            self._read({"format": FORMAT, "version": VERSION, "settings": json.loads(json.dumps(settings))})
        except Exception:
            self.file.close()
            raise

    def _read(self, header: dict) -> None:
        self.file.seek(0)
        first, *lines = self.file.read().splitlines(keepends=True) or [b""]
        made = _parse(first)
        if first and (made.get("format") != FORMAT or not isinstance(made.get("settings"), dict)):
            raise InputError(f"{self.path} is not a journal of an evaluation: move it away")
        good, n_intact = [], len(first)  # bytes in front of the first damaged line
        for line in lines:
            content = _parse(line)
            if line.endswith(b"\n") and content.pop("crc32", None) == _checksum(content):
                self.finished[content["pair"]] = content["results"]
                good.append(line)
                n_intact += 0 if self.n_damaged else len(line)
            else:
                self.n_damaged += 1
        if not self.finished:
            self.file.truncate(0)
            self._append(header)
            return
        check_settings(made, header, f"{self.path}, an unfinished run (delete it to start anew),")
        self.file.truncate(n_intact)
        self.file.write((first + b"".join(good))[n_intact:])

    def _append(self, content: dict) -> None:
        data = json.dumps(content).encode() + b"\n"
        size = os.fstat(self.file.fileno()).st_size
        try:
            if self.file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self.file.truncate(size)
            raise OutputError(error.errno, f"{error.strerror}; what is done is kept", str(self.path)) from None

    def add(self, pair: int, results: list[dict]) -> None:
        """Append a finished pair."""
        content = {"pair": pair, "results": results}
        self._append({**content, "crc32": _checksum(content)})
        self.n_added += 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if not self.finished and not self.n_added:
            with contextlib.suppress(PermissionError):  # Windows removes no open file
                self.path.unlink(missing_ok=True)
        self.file.close()


def _parse(line: bytes) -> dict:
    """A line of a journal; {} if it is damaged."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _checksum(content: dict) -> int:
    return zlib.crc32(json.dumps(content).encode())
