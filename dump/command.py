"""What the commands share: their common options, what ends them, and what they say at their end."""
import contextlib
import os
import sys

from tools.cli import InputError
from tools.files import write_json


def add_common_options(parser) -> None:
    parser.add_argument("--device", default="auto", help="for networks: auto, cpu, cuda or cuda:N")
    parser.add_argument("--report", metavar="FILE", help="write counts, rates and memory of this process as JSON")
    parser.add_argument("--verify", action="store_true", help="only read again what was written")


@contextlib.contextmanager
def writing(target, after: str = "what is done is kept"):
    """What keeps the block from writing, a full disk for one, ends the command in one line that names `target`."""
    try:
        yield
    except OSError as error:
        # without HDF5's account of its own functions
        message = os.strerror(error.errno) if error.errno else str(error)
        raise InputError(f"cannot write {target}: {message}; {after}") from None


def finish_report(path, report: dict) -> None:
    """Print the rates and sizes of a report that are known; write it as JSON if there is a `path`."""
    print(", ".join(f"{report[name]:.{digits}f} {unit}" for name, digits, unit in (
        ("images_per_second", 2, "images/s"), ("pairs_per_second", 1, "pairs/s"),
        ("megabytes_per_image", 2, "MB an image"), ("peak_memory_mb", 0, "MB of memory")) if report[name] is not None))
    if path:
        with writing(f"--report {path}", "all else is done"):
            write_json(path, report)


def report_verified(n: int, problems: list, kind: str) -> int:
    """Print what a verification found, (name, problem) each; return the exit status that says so."""
    print(f"{n} {kind} read, {len(problems)} problems")
    for name, problem in problems:
        print(f"  {name}: {problem}", file=sys.stderr)
    return 1 if problems else 0
