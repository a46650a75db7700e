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
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import cv2  # noqa: E402
import torch  # noqa: E402
from fuzz_kinds import KINDS  # noqa: E402
from mutations import mutate  # noqa: E402

import tools.cli  # noqa: E402
from tools.cli import InputError, OutputError  # noqa: E402

HANG = 20  # seconds
MEMORY = 2 ** 30  # bytes
BATCH = 25  # inputs of one process


# one input

@dataclass
class Failure:
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
        named = isinstance(error, OSError) and error.filename
        if not isinstance(error, InputError | OutputError) and not named:
            found.append(failure_of(error))
        return describe(error)

    def note_warning(message, category, filename, lineno, *_):
        frames = [(frame.filename, frame.lineno) for frame in traceback.extract_stack()[:-1]]
        found.append(Failure(category.__name__, place_of(frames),
                             f"{message}\n{''.join(traceback.format_stack()[:-1])}"))

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


def attempt(use, folder: Path, found: list | None = None) -> list[Failure]:
    """Let `use` read the files in `folder`, which is the working directory; what was wrong with how it ended."""
    found = [] if found is None else found
    before, said = os.getcwd(), io.StringIO()
    os.chdir(folder)
    try:
        with watch(found), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            use(folder)
    except (SystemExit, InputError, OutputError) as error:
        if isinstance(error, SystemExit) and error.code not in (0, 1, 2, None):
            found.append(failure_of(error))
    except BaseException as error:
        found.append(failure_of(error))
    finally:
        os.chdir(before)
    if "Traceback" in said.getvalue():
        found.append(Failure("traceback", "?", said.getvalue()))
    errors = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
    if any(len(line) > 1200 for line in errors):
        found.append(Failure("long message", "?", said.getvalue()))
    return found


def prepare(name: str, valid: Path, work: Path, number: int, seed: int) -> str:
    """A copy of the valid files with one of them changed; returns what was done."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(valid, work)
    rng = random.Random(f"{seed} {name} {number}")
    if number == 0:  # the valid files have to pass, too
        return "unchanged"
    pattern, form = rng.choice(list(KINDS[name].files.items()))
    path = rng.choice(sorted(work.glob(pattern)) or sorted(path for other in KINDS[name].files
                                                           for path in work.glob(other)))
    return f"{path.relative_to(work)}: {mutate(path, form, rng)}"


def memory(what: str = "VmHWM") -> int:
    return int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def names_outside(home: Path) -> set[str]:
    return {path.name for path in home.iterdir()} - {"valid", "work", "log"}


def do_one(name: str, home: Path, number: int, seed: int) -> tuple[str, list[Failure]]:
    """Make input `number` in home/work and try it; what was done, and what failed."""
    done = prepare(name, home / "valid", home / "work", number, seed)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    at_start = memory()
    found = attempt(KINDS[name].use, home / "work")
    if memory() - at_start > MEMORY:
        found.append(Failure("memory", "?", f"{(memory() - at_start) / 2 ** 30:.1f} GB"))
    if not KINDS[name].names_a_place and (strays := names_outside(home)):
        found.append(Failure("written outside", "?", str(strays)))
        for stray in strays:
            (home / stray).unlink() if (home / stray).is_file() else shutil.rmtree(home / stray)
    return done, found


# many

@dataclass
class Table:
    """What came of the inputs."""

    inputs: Counter = field(default_factory=Counter)
    failed: Counter = field(default_factory=Counter)
    causes: Counter = field(default_factory=Counter)
    first: dict = field(default_factory=dict)
    seconds: Counter = field(default_factory=Counter)

    def add(self, name: str, number: int, seconds: float, failures: list[Failure]) -> None:
        self.inputs[name] += 1
        self.seconds[name] += seconds
        self.failed[name] += bool(failures)
        for failure in {(failure.cause, failure.place): failure for failure in failures}.values():
            key = failure.cause, failure.place
            self.causes[key] += 1
            if key not in self.first:
                print(f"{name} {number}: {failure.cause} {failure.place}", file=sys.stderr, flush=True)
            self.first.setdefault(key, (name, number, failure.text))

    def text(self) -> str:
        lines = [f"{'kind':20} {'inputs':>7} {'passed':>7} {'failed':>7} {'ms each':>8}"]
        for name, n in self.inputs.items():
            failed, milliseconds = self.failed[name], 1000 * self.seconds[name] / n
            lines.append(f"{name:20} {n:7} {n - failed:7} {failed:7} {milliseconds:8.0f}")
        n, failed = sum(self.inputs.values()), sum(self.failed.values())
        lines.append(f"{'all':20} {n:7} {n - failed:7} {failed:7}")
        for (cause, place), n in self.causes.most_common():
            name, number, text = self.first[cause, place]
            last = (text.strip().splitlines() or [""])[-1]
            lines.append(f"{n:5} {cause:22} {place:36} {name} {number}: {last[:110]}")
        return "\n".join(lines)


def work_through(name: str, home: Path, numbers: list[int], seed: int, pipe) -> None:
    """The child: does inputs one after another, and says before each which it is."""
    log = open(home / "log", "w")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable(log)
    faulthandler.register(signal.SIGUSR1, log, all_threads=False)
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    tempfile.tempdir = str(home.parent)
    for number in numbers:
        pipe.send((number, None))
        pipe.send((number, do_one(name, home, number, seed)))


class Child:
    """A process that does a batch of inputs of one kind, watched from outside."""

    def __init__(self, name: str, home: Path, numbers: list[int], seed: int):
        self.name, self.home, self.numbers, self.began = name, home, list(numbers), time.monotonic()
        self.current = numbers[0]  # also before it says so: a process that never does must not be started for ever
        self.pipe, theirs = multiprocessing.Pipe(duplex=False)
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            self.pipe.close()
            status = 1
            try:
                work_through(name, home, numbers, seed, theirs)
                status = 0
            finally:
                os._exit(status)
        theirs.close()
        self.start_memory = self._memory()

    def _memory(self) -> int:
        with contextlib.suppress(OSError, IndexError):
            return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return 0

    def end(self, cause: str | None = None) -> tuple[str, Failure] | None:
        """Wait for the process, or end it because of `cause`; what killed it during an input, if something did."""
        if cause:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGUSR1)  # where it is
                time.sleep(0.3)
                os.killpg(self.pid, signal.SIGKILL)
        status = os.waitpid(self.pid, 0)[1]
        self.pipe.close()
        if self.current is None:
            return None
        log = (self.home / "log").read_text(errors="replace")
        stack = re.findall(r'File "(.+?)", line (\d+)', log)
        if cause is None:
            killed = os.WIFSIGNALED(status)
            cause = signal.Signals(os.WTERMSIG(status)).name if killed else f"exit {os.WEXITSTATUS(status)}"
        return "died", Failure(cause, place_of(reversed(stack)), log)

    def messages(self):
        """(number, seconds, (what was done, failures)) of what it finished; then of what ended it early, if so."""
        over = None
        try:
            while self.pipe.poll():
                number, outcome = self.pipe.recv()
                if outcome is None:
                    self.current, self.began = number, time.monotonic()
                else:
                    self.numbers.remove(number)
                    self.current = self.numbers[0] if self.numbers else None
                    yield number, time.monotonic() - self.began, outcome
        except EOFError:
            over = "ended"
        if over is None:
            over = ("hang" if time.monotonic() - self.began > HANG else
                    "memory" if self._memory() - self.start_memory > MEMORY else None)
        if over:
            number, seconds = self.current, time.monotonic() - self.began
            died = self.end(None if over == "ended" else over)
            self.pid = None
            if died:
                self.numbers.remove(number)
                yield number, seconds, (died[0], [died[1]])


def keep(folder: Path, name: str, home: Path, number: int, seed: int, outcome) -> None:
    """Write a failing input, made again, with what is known of it."""
    place = folder / f"{name}-{number}"
    prepare(name, home / "valid", place, number, seed)
    (place / "failure.txt").write_text(f"seed {seed}, {outcome[0]}\n"
                                       + "\n".join(failure.text for failure in outcome[1]), errors="replace")


def fuzz(names: list[str], inputs: int, seed: int = 0, workers: int = 2, kept: Path | None = None,
         only: int | None = None) -> Table:
    """Try about `inputs` inputs, spread over the kinds, in forked processes."""
    table, shares = Table(), sum(KINDS[name].share for name in names)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as base:
        batches = []
        for name in names:
            valid = Path(base, name, "valid")
            valid.mkdir(parents=True)
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                KINDS[name].make(valid)
            numbers = list(range(max(round(inputs * KINDS[name].share / shares), 2))) if only is None else [only]
            batches += [(name, numbers[k:k + BATCH]) for k in range(0, len(numbers), BATCH)]
        free, running = set(range(workers)), {}
        while batches or running:
            while batches and free:
                name, numbers = batches.pop(0)
                slot = free.pop()
                home = Path(base, name, str(slot))
                home.mkdir(exist_ok=True)
                if not (home / "valid").exists():
                    (home / "valid").symlink_to("../valid")
                running[slot] = Child(name, home, numbers, seed)
            multiprocessing.connection.wait([child.pipe for child in running.values()], timeout=0.1)
            for slot, child in list(running.items()):
                for number, seconds, outcome in child.messages():
                    table.add(child.name, number, seconds, outcome[1])
                    if outcome[1] and kept and all(table.causes[failure.cause, failure.place] <= 3
                                                   for failure in outcome[1]):
                        keep(kept, child.name, child.home, number, seed, outcome)
                if child.pid is None:
                    del running[slot]
                    free.add(slot)
                    if child.numbers:
                        batches.insert(0, (child.name, child.numbers))
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
