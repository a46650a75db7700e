"""Configurations: a dict of defaults, overlaid by a file and by the command line, every key checked."""
import contextlib
import difflib
import json
import math
import sys
from pathlib import Path

import yaml

from imp_matching import shipped
from tools.cli import InputError
from tools.files import read_json, read_text

_KIND = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "a list",
         dict: "a mapping"}


def find_config(path) -> Path:
    """A configuration as named; where NAME or configs/NAME is not there, the one of that name that ships."""
    path = Path(path)
    own = shipped("configs") / path.name
    return own if path.parent in (Path(), Path("configs")) and not path.exists() and own.is_file() else path


def read_yaml(path) -> dict:
    """Read a YAML file that holds a mapping."""
    try:
        content = yaml.safe_load(read_text(find_config(path)))
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} does not hold keys and values")
    return content


def _typed(key: str, value, default, source: str):
    """`value` as the type of `default`; an int passes for a float, 0 and 1 for a bool, a text that says a number for
    one; None: a string or nothing, which the text "None" is too."""
    expected = str if default is None else type(default)
    if default is None and value == "None":
        return None
    if expected in (int, float) and isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = expected(value)
    if expected is bool and value in (0, 1):
        return bool(value)
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 2 ** 63 else math.inf
    if default is None and value is None:
        return None
    if isinstance(value, expected) and not (expected is int and isinstance(value, bool)):
        return value
    raise InputError(f"{source}: {key} should be {_KIND[expected]}, not {json.dumps(value, default=str)}")


def overlay(defaults: dict, values: dict, source: str) -> dict:
    """`defaults` with `values` in their place; InputError names an unknown key and its nearest, or a wrong type."""
    return {**defaults, **_checked(defaults, values, source)}


def _checked(defaults: dict, values: dict, source: str) -> dict:
    config = {}
    for key, value in values.items():
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, n=1, cutoff=0)
            raise InputError(f"{source}: unknown key {key!r}; did you mean {near[0]!r}?")
        config[key] = _typed(key, value, defaults[key], source)
    return config


def parse_overrides(arguments: list[str]) -> dict:
    """`--key value ...` pairs from the command line -> dict; values are read as JSON where they are JSON.

    Several values make a list. Dashes in keys are underscores.
    """
    values, key = {}, None
    for argument in arguments:
        if argument.startswith("--"):
            key, equals, value = argument[2:].partition("=")
            key = key.replace("-", "_")
            values[key] = [value] if equals else []
        elif key is None:
            raise InputError(f"unexpected argument {argument!r}: settings are given as --key value")
        else:
            values[key].append(argument)
    parsed = {}
    for key, words in values.items():
        if not words:
            raise InputError(f"--{key} lacks a value")
        read = [_from_json(word) for word in words]
        parsed[key] = read[0] if len(read) == 1 else read
    return parsed


def _from_json(word: str):
    try:
        return json.loads(word)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(word, word)


def load_config(path, defaults: dict, arguments: list[str], unused=()) -> dict:
    """Defaults, overlaid by a JSON or YAML file and then by command-line `arguments` (see `parse_overrides`).

    unused: keys that the file may have and nobody needs, which are named and left out.
    """
    content = read_yaml(path) if Path(path).suffix in (".yaml", ".yml") else read_json(find_config(path))
    if not isinstance(content, dict):
        raise InputError(f"{path} does not hold keys and values")
    left_out = [key for key in content if key in unused]
    if left_out:
        print(f"note: {path}: not used here: {', '.join(left_out)}", file=sys.stderr)
    config = overlay(defaults, {key: value for key, value in content.items() if key not in unused}, str(path))
    overrides = parse_overrides(arguments)
    for key, value in overrides.items():
        if isinstance(defaults.get(key), list) and not isinstance(value, list):
            overrides[key] = [value]
    return {**config, **_checked(defaults, overrides, "command line")}
