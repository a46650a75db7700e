"""The file that lets an interrupted evaluation go on: a line of JSON for each finished pair.

    {"format": "imp-eval-journal", "version": 3, "settings": {...}}       first line: what the results depend on
    {"pair": 17, "results": [{"method": ..., "estimator": ..., "threshold": ..., "seed": ..., "result": {...}},
                              ...]}
    ...

`pair` is the place in the set, `result` the fields of `eval.results.PairResult`; an error without a pose is Infinity,
as Python's json writes it. A line is written when its pair is finished. One that is not whole, and what comes after it,
is what an interruption left: it is cut off, and those pairs are done again.
"""
import json
from pathlib import Path

from tools.cli import InputError
from tools.locks import try_lock
from tools.manifest import check_settings

FORMAT = "imp-eval-journal"
VERSION = 3


class Journal:
    """An open journal. finished: what it held when it was opened, {pair: results as in the format}.

    settings: what the results depend on, as JSON. Raises InputError if the file holds pairs done with other settings,
    if it is no journal, or if another process has it open. To be used in a with statement, at whose end it goes if no
    pair was finished.
    """

    def __init__(self, path, settings: dict):
        self.path = Path(path)
        header = {"format": FORMAT, "version": VERSION, "settings": json.loads(json.dumps(settings))}
        self.finished, self.n_added = {}, 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "a+b")
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}") from None
        if not try_lock(self.file):
            self.file.close()
            raise InputError(f"another evaluation is writing to {self.path.parent}: wait for it, or name another "
                             "--save_path")
        try:
            self._read(header)
        except InputError:
            self.file.close()
            raise

    def _read(self, header: dict) -> None:
        self.file.seek(0)
        made, whole = None, 0  # the first line; bytes of whole lines
        for line in self.file:
            content = _parse(line)
            if made is None:
                made = content
                if made.get("format") != FORMAT:
                    raise InputError(f"{self.path} is no journal of an evaluation: move it away")
            elif "pair" in content and "results" in content:
                self.finished[content["pair"]] = content["results"]
            else:
                break
            whole += len(line)
        if self.finished:
            check_settings(made, header, f"{self.path}, an unfinished run (delete it to start anew),")
            self.file.truncate(whole)
        else:
            self.file.truncate(0)
            self._write(header)

    def _write(self, content: dict) -> None:
        try:
            self.file.write(json.dumps(content).encode() + b"\n")
            self.file.flush()
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}; what is done is kept") from None

    def add(self, pair: int, results: list[dict]) -> None:
        """Append a finished pair."""
        self._write({"pair": pair, "results": results})
        self.n_added += 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if not self.finished and not self.n_added:
            self.path.unlink(missing_ok=True)
        self.file.close()


def _parse(line: bytes) -> dict:
    """A line of a journal; {} if it is not whole."""
    try:
        content = json.loads(line) if line.endswith(b"\n") else {}
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
