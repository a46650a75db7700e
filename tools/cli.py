"""What every command shares: how a user's mistake and an interruption end, and where results go on screen."""
import argparse
import math
import sys

# OpenCV counts in 32 bits, and is asked for twice as many keypoints where places are to be unique
MOST_KEYPOINTS = 2 ** 30 - 1


class InputError(Exception):
    """A mistake in what the user gave: one line that names the file or option and says how to mend it."""


def run(main, argv=None) -> int:
    """Call `main(argv) -> exit status` and turn a user's mistake into one line and status 2.

    Status 0: done. 1: done, but some items were skipped (the command listed them). 2: nothing could be done.
    130: stopped by Ctrl-C.
    """
    try:
        return main(argv) or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def whole_number(least: int, most: int = 2 ** 31 - 1):
    """An argparse type: a whole number from least to most."""
    def parse(text: str) -> int:
        try:
            if least <= int(text) <= most:
                return int(text)
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} to {most}")
    return parse


def number(least: float, most: float = math.inf):
    """An argparse type: a finite number from least to most."""
    def parse(text: str) -> float:
        try:
            if least <= float(text) <= most and math.isfinite(float(text)):
                return float(text)
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is no number from {least:g} to {most:g}")
    return parse


def report_skipped(skipped: list, what: str) -> int:
    """List the items a long job left out, as (name, reason) pairs; return the exit status that says so."""
    if not skipped:
        return 0
    print(f"{len(skipped)} {what} skipped:", file=sys.stderr)
    for name, reason in skipped:
        print(f"  {name}: {reason}", file=sys.stderr)
    return 1
