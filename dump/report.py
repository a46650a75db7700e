"""What the dumps say at their end."""
import contextlib
import os
import sys
from pathlib import Path

from tools.cli import InputError
from tools.files import write_json

resource = None  # Windows has none
with contextlib.suppress(ImportError):
    import resource


def why(error: OSError) -> str:
    """What the system said, without HDF5's account of its own functions."""
    return os.strerror(error.errno) if error.errno else str(error)


RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes, of getrusage


def _peak_of_this_process() -> float:
    """Bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        # what getrusage gives counts the process that started this one, up to then
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):  # no Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT


def peak_memory_mb(workers: int) -> float | None:
    """Most memory that this process held so far, plus `workers` times that of the largest process it started.

    Of the latter, those that have ended count. None where the system does not say.
    """
    if resource is None:
        return None
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * RSS_UNIT
    return (_peak_of_this_process() + workers * child) / 1e6


def print_rates(report: dict) -> None:
    """One line of the rates and sizes of a report, those that are known."""
    print(", ".join(f"{report[name]:.{digits}f} {unit}" for name, digits, unit in (
        ("images_per_second", 2, "images/s"), ("pairs_per_second", 1, "pairs/s"),
        ("megabytes_per_image", 2, "MB an image"), ("peak_memory_mb", 0, "MB of memory")) if report[name] is not None))


def report_verified(n: int, problems: list, what: str) -> int:
    """Print what a verification found, (name, what is wrong) each; return the exit status that says so."""
    print(f"{n} {what} read, {len(problems)} problems")
    for name, problem in problems:
        print(f"  {name}: {problem}", file=sys.stderr)
    return 1 if problems else 0


def write_report(path, report: dict) -> None:
    """Write what --report asks for; InputError if that cannot be done."""
    try:
        write_json(path, report)
    except OSError as error:
        raise InputError(f"cannot write --report {path}: {why(error)}; all else is done") from None
