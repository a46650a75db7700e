"""What every command shares: how a user's mistake and an interruption end, and where results go on screen."""
import _thread
import argparse
import contextlib
import errno
import math
import os
import sys
import threading
import traceback
from concurrent.futures import BrokenExecutor
from pickle import UnpicklingError

# OpenCV counts in 32 bits, and is asked for twice as many keypoints where places are to be unique
MOST_KEYPOINTS = 2 ** 30 - 1


class InputError(Exception):
    """A mistake in what the user gave: one line that names the file or option and says how to mend it."""

    def __str__(self):
        return " ".join(super().__str__().split())  # a name may hold line breaks


class InUse(InputError):
    """Another process writes there."""


class OutputError(OSError):
    """What is written to is at fault (full, read-only, not permitted): it ends a whole job, not one of its items.

    Arguments as OSError's: number, text, path.
    """

    def __str__(self):
        return f"cannot write {self.filename}: {self.strerror}"


# of the machine, not of a file that is read
_MACHINE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


def describe_error(error: BaseException) -> str:
    """One line about any error, at most 500 characters."""
    if isinstance(error, InputError | OutputError | UnpicklingError):
        text = str(error)
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, MemoryError):
        text = "not enough memory"
    else:
        text = f"{type(error).__name__}: {error}"
    text = " ".join(text.split())
    return text if len(text) <= 500 else f"{text[:400]} ... {text[-90:]}"  # a path is often at the end


def reason(error: Exception) -> str:
    """Why one item of a long job is skipped: the boundary around each item, for any exception.

    Raises `error` again if it is not the item's fault and would meet the next one too.
    """
    if isinstance(error, OutputError | InUse | BrokenExecutor) or getattr(error, "errno", None) in _MACHINE_ERRORS:
        raise error
    return describe_error(error)


def run(main, argv=None) -> int:
    """Call `main(argv) -> exit status`, the boundary around each command: any error becomes one line and status 2.

    Status 0: done. 1: done, but some items were skipped (the command listed them). 2: nothing could be done.
    130: stopped by Ctrl-C. `--debug` among the arguments shows an error's traceback; `~` is the home folder.
    """
    for stream in (sys.stdout, sys.stderr):  # names of files may hold bytes that no encoding knows
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    argv = [_expand_home(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    debug = "--debug" in argv
    previous, sys.unraisablehook = sys.unraisablehook, _interrupt_again
    try:
        return main([argument for argument in argv if argument != "--debug"]) or 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `... | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        known = isinstance(error, InputError | OSError | MemoryError)
        said = describe_error(error)
        print(f"error: {said}" if known else f"{said} (unexpected; --debug shows where)", file=sys.stderr)
        return 2
    finally:
        sys.unraisablehook = previous


def _interrupt_again(ignored) -> None:
    """Python drops what is raised while it frees objects (h5py's, say): a Ctrl-C dropped there comes a second time."""
    if issubclass(ignored.exc_type, KeyboardInterrupt):
        threading.Timer(0.01, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(ignored)


def _expand_home(argument: str) -> str:
    """~/x and --option=~/x with the home folder, as a shell does not do it for the latter."""
    option, equals, value = argument.partition("=")
    if equals and option.startswith("--"):
        return option + equals + os.path.expanduser(value)
    return os.path.expanduser(argument)


def number(least: float, most: float = math.inf, kind: type = float):
    """An argparse type: a finite number from least to most, of a kind float or int."""
    def parse(text: str):
        with contextlib.suppress(ValueError):
            if least <= kind(text) <= most and math.isfinite(kind(text)):
                return kind(text)
        name = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"{text!r} is not a {name} from {least:.12g} to {most:.12g}")
    return parse


def whole_number(least: int, most: int = 2 ** 31 - 1):
    """An argparse type: a whole number from least to most."""
    return number(least, most, int)


def report_skipped(skipped: list, items: str) -> int:
    """List the items a long job left out, as (name, reason) pairs; return the exit status that says so."""
    if not skipped:
        return 0
    print(f"{len(skipped)} {items} skipped:", file=sys.stderr)
    for name, reason in skipped:
        print("  " + " ".join(f"{name}: {reason}".split()), file=sys.stderr)
    return 1
