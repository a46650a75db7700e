"""Damaged files of every kind that the project reads: each ends in a result, or in one line that says what is wrong.

    python3 tests/fuzz.py [--inputs 10000] [--seed 0] [--kind NAME ...] [--keep runs/fuzz] [--workers 2]

Small valid files are changed (tests/mutations.py) and given to the public loaders and to the commands, in processes
that are forked from this one, which has all modules loaded. An input fails if an exception other than InputError
reaches the boundary around a command or around one item of its work, if the process dies, takes longer than HANG
seconds or MEMORY bytes more than at its start, if a message has several lines, or if something is written outside the
folder of the results. The table at the end is a list of what to mend: each line a cause and a place in our code.
`--keep` gets the failing inputs: KIND-NUMBER/, the folder as the command saw it, with failure.txt in it. An input
depends on seed, kind and number alone: `--kind NAME --only NUMBER` does one again.
"""
import argparse
import contextlib
import faulthandler
import io
import multiprocessing.connection
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, deque
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import cv2  # noqa: E402
import torch  # noqa: E402
from fuzz_kinds import KINDS  # noqa: E402
from mutations import mutate  # noqa: E402

import tools.cli  # noqa: E402
from tools.cli import InputError, OutputError  # noqa: E402
from tools.processes import peak_bytes  # noqa: E402

HANG = 20  # seconds
MEMORY = 2 ** 30  # bytes that an input may take
MOST_MEMORY = 2 ** 33  # bytes that a process can have: what asks for more is refused
BATCH = 25  # inputs of one process


# one input

class Failure(NamedTuple):
    """cause: in a word or two; place: file:line of ours; text: all that is known."""

    cause: str
    place: str
    text: str


def place_of(stack) -> str:
    """The innermost frame of ours, of (file name, line) pairs from the outermost."""
    ours = [(Path(name), line) for name, line in stack if name.startswith(str(ROOT)) and "/tests/" not in name
            and "/.venv/" not in name]
    return f"{ours[-1][0].relative_to(ROOT)}:{ours[-1][1]}" if ours else "?"


def failure_of(error: BaseException) -> Failure:
    frames = traceback.extract_tb(error.__traceback__)
    return Failure(type(error).__name__, place_of((frame.filename, frame.lineno) for frame in frames),
                   "".join(traceback.format_exception(error)))


@contextlib.contextmanager
def watch(found: list):
    """Note in `found` what is described at a boundary and is no error that the code foresees, and what warns."""
    describe = tools.cli.describe_error

    def describe_and_note(error):
        if not isinstance(error, InputError | OutputError) and not getattr(error, "filename", None):
            found.append(failure_of(error))
        return describe(error)

    def note_warning(message, category, filename, lineno, *_):
        stack = traceback.extract_stack()[:-1]
        found.append(Failure(category.__name__, place_of((frame.filename, frame.lineno) for frame in stack),
                             f"{message}\n{''.join(traceback.format_list(stack))}"))

    tools.cli.describe_error = describe_and_note
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        for silent in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):  # as by default
            warnings.simplefilter("ignore", silent)
        warnings.showwarning = note_warning
        try:
            yield
        finally:
            tools.cli.describe_error = describe


def attempt(use, folder: Path) -> list[Failure]:
    """Let `use` read the files in `folder`, which is the working directory; what was wrong with how it ended."""
    found, said = [], io.StringIO()
    try:
        with (contextlib.chdir(folder), watch(found), contextlib.redirect_stdout(io.StringIO()),
              contextlib.redirect_stderr(said)):
            use()
    except (InputError, OutputError):
        pass
    except BaseException as error:
        if not isinstance(error, SystemExit) or error.code not in (0, 1, 2, None):
            found.append(failure_of(error))
    if "Traceback" in said.getvalue():
        found.append(Failure("traceback", "?", said.getvalue()))
    if any(line.startswith("error: ") and len(line) > 1200 for line in said.getvalue().splitlines()):
        found.append(Failure("long message", "?", said.getvalue()))
    return found


def prepare(name: str, valid: Path, work: Path, number: int, seed: int) -> str:
    """A copy of the valid files with one of them changed; returns what was done."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(valid, work)
    if number == 0:  # the valid files have to pass, too
        return "unchanged"
    rng, files = random.Random(f"{seed} {name} {number}"), KINDS[name].files
    pattern, form = rng.choice(list(files.items()))
    path = rng.choice(sorted(work.glob(pattern)) or sorted(path for other in files for path in work.glob(other)))
    return f"{path.relative_to(work)}: {mutate(path, form, rng)}"


def do_one(name: str, home: Path, number: int, seed: int) -> tuple[str, list[Failure]]:
    """Make input `number` in home/work and try it; what was done, and what failed."""
    done = prepare(name, home / "valid", home / "work", number, seed)
    Path("/proc/self/clear_refs").write_text("5")
    at_start = peak_bytes()
    found = attempt(KINDS[name].use, home / "work")
    taken = peak_bytes() - at_start
    if taken > MEMORY:
        found.append(Failure("memory", "?", f"{taken / 2 ** 30:.1f} GB"))
    strays = [path for path in home.iterdir() if path.name not in ("valid", "work", "log")]
    if strays and not KINDS[name].names_a_place:
        found.append(Failure("written outside", "?", str(strays)))
        for stray in strays:
            stray.unlink() if stray.is_file() else shutil.rmtree(stray)
    return done, found


# many

class Table:
    """What came of the inputs."""

    def __init__(self):
        self.inputs, self.failed, self.causes, self.seconds, self.first = Counter(), Counter(), Counter(), Counter(), {}

    def add(self, name: str, number: int, seconds: float, failures: list[Failure]) -> None:
        self.inputs[name] += 1
        self.seconds[name] += seconds
        self.failed[name] += bool(failures)
        for key, failure in {failure[:2]: failure for failure in failures}.items():
            self.causes[key] += 1
            if key not in self.first:
                self.first[key] = name, number, failure.text
                print(f"{name} {number}: {failure.cause} {failure.place}", file=sys.stderr, flush=True)

    def text(self) -> str:
        lines = [f"{'kind':20} {'inputs':>7} {'passed':>7} {'failed':>7} {'ms each':>8}"]
        for name, n in self.inputs.items():
            failed, milliseconds = self.failed[name], 1000 * self.seconds[name] / n
            lines.append(f"{name:20} {n:7} {n - failed:7} {failed:7} {milliseconds:8.0f}")
        n, failed = self.inputs.total(), self.failed.total()
        lines.append(f"{'all':20} {n:7} {n - failed:7} {failed:7}")
        for (cause, place), n in self.causes.most_common():
            name, number, text = self.first[cause, place]
            last = (text.strip().splitlines() or [""])[-1]
            lines.append(f"{n:5} {cause:22} {place:36} {name} {number}: {last[:110]}")
        return "\n".join(lines)


def work_through(name: str, home: Path, numbers: list[int], seed: int, pipe) -> None:
    """The forked process: does inputs one after another, and ends with a trace of where it is if one takes too long."""
    log = open(home / "log", "w")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
    faulthandler.enable(log)
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    tempfile.tempdir = str(home.parent)
    for number in numbers:
        began = time.monotonic()
        faulthandler.dump_traceback_later(HANG, exit=True, file=log)
        outcome = do_one(name, home, number, seed)
        pipe.send((number, time.monotonic() - began, *outcome))
    faulthandler.cancel_dump_traceback_later()


def death(exit_code: int, log: str) -> Failure:
    """Why a process ended before it was done."""
    cause = f"exit {exit_code}" if exit_code >= 0 else signal.Signals(-exit_code).name
    stack = re.findall(r'File "(.+?)", line (\d+)', log)
    return Failure("hang" if log.startswith("Timeout") else cause, place_of(reversed(stack)), log)


def keep(folder: Path, name: str, home: Path, number: int, seed: int, done: str, failures: list[Failure]) -> None:
    """Write a failing input, made again, with what is known of it."""
    place = folder / f"{name}-{number}"
    prepare(name, home / "valid", place, number, seed)
    (place / "failure.txt").write_text(f"seed {seed}, {done}\n" + "\n".join(failure.text for failure in failures),
                                       errors="replace")


def fuzz(names: list[str], inputs: int, seed: int = 0, workers: int = 2, kept: Path | None = None,
         only: int | None = None) -> Table:
    """Try about `inputs` inputs, spread over the kinds, in forked processes."""
    table, shares = Table(), sum(KINDS[name].share for name in names)
    fork = multiprocessing.get_context("fork")
    warnings.simplefilter("ignore")

    def note(name, home, number, seconds, done, failures):
        table.add(name, number, seconds, failures)
        if failures and kept and all(table.causes[failure[:2]] <= 3 for failure in failures):
            keep(kept, name, home, number, seed, done, failures)

    with tempfile.TemporaryDirectory() as base:
        batches, homes, running = deque(), {}, {}
        for name in names:
            valid = Path(base, name, "valid")
            valid.mkdir(parents=True)
            with (contextlib.chdir(valid), contextlib.redirect_stderr(io.StringIO()),
                  contextlib.redirect_stdout(io.StringIO())):
                KINDS[name].make()
            homes[name] = [Path(base, name, str(slot)) for slot in range(workers)]
            for home in homes[name]:
                home.mkdir()
                (home / "valid").symlink_to("../valid")
            numbers = list(range(max(round(inputs * KINDS[name].share / shares), 2))) if only is None else [only]
            batches += [(name, numbers[k:k + BATCH]) for k in range(0, len(numbers), BATCH)]
        free = list(range(workers))
        while batches or running:
            while batches and free:
                name, numbers = batches.popleft()
                slot = free.pop()
                pipe, theirs = fork.Pipe(duplex=False)
                process = fork.Process(target=work_through, args=(name, homes[name][slot], numbers, seed, theirs))
                process.start()
                theirs.close()
                running[pipe] = process, name, slot, numbers
            for pipe in multiprocessing.connection.wait(running):
                process, name, slot, numbers = running[pipe]
                try:
                    number, *outcome = pipe.recv()
                    numbers.remove(number)
                    note(name, homes[name][slot], number, *outcome)
                except EOFError:  # it has ended, with all of its inputs done or in the midst of one
                    process.join()
                    if numbers:
                        home = homes[name][slot]
                        failure = death(process.exitcode, (home / "log").read_text(errors="replace"))
                        note(name, home, numbers.pop(0), 0.0, "died", [failure])
                    if numbers:
                        batches.appendleft((name, numbers))
                    del running[pipe]
                    free.append(slot)
    return table


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--inputs", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--only", type=int, metavar="NUMBER", help="just this input")
    parser.add_argument("--keep", type=Path, default=ROOT / "runs/fuzz", metavar="FOLDER", help="gets failing inputs")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    if args.keep.is_dir():
        shutil.rmtree(args.keep)
    table = fuzz(args.kind, args.inputs, args.seed, args.workers, args.keep, args.only)
    print(table.text())
    return 1 if sum(table.failed.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
