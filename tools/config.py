"""Configurations: a dict of defaults, overlaid by a file and by the command line, every key checked."""
import contextlib
import difflib
import json
import math
import os
import reprlib
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from tools.cli import InputError
from tools.files import find_shipped, read_json, read_text

_KIND = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "a list",
         dict: "a mapping"}
MAX_VALUES, MAX_LEVELS, MAX_BITS = 10 ** 5, 20, 4096  # of a configuration, and of a number in it
_shown = reprlib.Repr()  # of values in messages
_shown.maxlevel, _shown.maxstring, _shown.maxother = 2, 60, 60


class _Loader(yaml.SafeLoader):
    def flatten_mapping(self, node):
        seen = set()
        for key, _ in node.value:
            if _name(key) in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is there twice", problem_mark=key.start_mark)
            seen.add(_name(key))
        super().flatten_mapping(node)
        # merges of merges would grow without bound
        node.value = list({_name(key): (key, value) for key, value in node.value}.values())


def _name(key: yaml.Node):
    return key.value if isinstance(key, yaml.ScalarNode) else id(key)


def read_config(path) -> dict:
    """Read a JSON file, or a YAML file of any other suffix, that holds a mapping; `~` in it is the home folder.

    The key `base` names another such file, in the folder of this one, whose keys hold where this file has none.
    InputError if a key is there twice or is no text, or if there is more than anybody writes: aliases in YAML can say
    more values than memory holds.
    """
    merged, path, read = {}, Path(path), set()
    while True:
        path = find_shipped(path, "configs")
        content = read_json(path) if path.suffix == ".json" else read_yaml(path)
        content = _plain(content, path, iter(range(MAX_VALUES)))
        if not isinstance(content, dict):
            raise InputError(f"{path} does not hold keys and values")
        base = content.pop("base", None)
        merged = {**content, **merged}
        if base is None:
            return merged
        read.add(path)
        path = path.parent / _typed("base", base, "", str(path))
        if path in read:
            raise InputError(f"{path} is its own base")


def read_yaml(path):
    """What a YAML file holds; InputError names it when it is missing or not YAML, or has a key twice."""
    try:
        return yaml.load(read_text(path), _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid YAML: {error}") from None


def _plain(value, path, left: Iterator, level: int = 0):
    """A value as read, with the home folder for `~`; left: one for each value that there may be."""
    if level > MAX_LEVELS or next(left, None) is None:
        raise InputError(f"{path} holds too much: at most {MAX_VALUES} values in {MAX_LEVELS} levels are read")
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise InputError(f"{path}: key {_shown.repr(key)} is not text: put quotes round it")
        return {key: _plain(entry, path, left, level + 1) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry, path, left, level + 1) for entry in value]
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise InputError(f"{path} holds a number of {value.bit_length()} bits")
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


def _typed(key: str, value, default, source: str):
    """`value` as the type of `default`; an int passes for a float, 0 and 1 for a bool, a text that says a number for
    one; None: a string or nothing, which the text "None" is too. A float is finite."""
    expected = str if default is None else type(default)
    if default is None and value in (None, "None"):
        return None
    if expected is bool and value in (0, 1):
        return bool(value)
    if expected in (int, float) and isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = expected(value)
    if expected is float and type(value) is int:
        value = float(value) if abs(value) < 2 ** 63 else math.inf
    if type(value) is not expected:
        raise InputError(f"{source}: {key} should be {_KIND[expected]}, not {_shown.repr(value)}")
    if expected is float and not math.isfinite(value):
        raise InputError(f"{source}: {key} {value}: expected a finite number")
    return value


def overlay(defaults: dict, values: dict, source: str, base: dict | None = None) -> dict:
    """`defaults`, or `base`, which has their keys, with `values` in their place.

    InputError names an unknown key and its nearest, or a value that is not of its default's type.
    """
    check_keys(values, defaults, source)
    return {**(base or defaults), **{key: _typed(key, value, defaults[key], source) for key, value in values.items()}}


def check_keys(keys, known, source: str) -> None:
    """InputError that names the first of `keys` that is not known, and its nearest."""
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0)
            raise InputError(f"{source}: unknown key {_shown.repr(key)}; did you mean {near[0]!r}?")


def parse_overrides(arguments: list[str]) -> dict:
    """`--key value ...` pairs from the command line -> dict; values are read as JSON where they are JSON.

    Several values make a list. Dashes in keys are underscores.
    """
    values, key = {}, None
    for argument in arguments:
        if argument.startswith("--"):
            key, equals, value = argument[2:].partition("=")
            key = key.replace("-", "_")
            values[key] = [_from_json(value)] if equals else []
        elif key is None:
            raise InputError(f"unexpected argument {argument!r}: settings are given as --key value")
        else:
            values[key].append(_from_json(argument))
    if [] in values.values():
        raise InputError(f"--{next(key for key, read in values.items() if not read)} lacks a value")
    return {key: read[0] if len(read) == 1 else read for key, read in values.items()}


def _from_json(word: str):
    try:
        return json.loads(word)
    except (ValueError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(word, word)


def load_config(path, defaults: dict, arguments: list[str], unused=()) -> dict:
    """Defaults, overlaid by a JSON or YAML file and then by command-line `arguments` (see `parse_overrides`).

    unused: keys that the file may have and nobody needs, which are named and left out.
    """
    content, overrides = read_config(path), parse_overrides(arguments)
    left_out = [key for key in content if key in unused]
    if left_out:
        print(f"note: {path}: not used here: {', '.join(left_out)}", file=sys.stderr)
    config = overlay(defaults, {key: value for key, value in content.items() if key not in unused}, str(path))
    for key, value in overrides.items():
        if isinstance(defaults.get(key), list) and not isinstance(value, list):
            overrides[key] = [value]
    return overlay(defaults, overrides, "command line", config)
