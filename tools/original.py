"""The evaluation YAMLs of the original program, in our keys: one kind for `dump.dump`, one for `eval.eval_imp`.

Both functions name the keys that are not needed here in one line on stderr, and raise InputError for an unknown one.
"""
import sys
from pathlib import Path

from tools.cli import InputError
from tools.config import check_keys, overlay

DUMP_KEYS = {"data_name": "dataset", "rawdata_dir": "raw_data_dir", "data_seq": "scenes", "pair_list": "pair_list"}
DUMP_UNUSED = ("feature_dump_dir", "overwrite", "extract")
EXTRACTOR_KEYS = ("name", "num_kpt", "resize", "num_process", "det_th", "overwrite", "extract")
FEATURES = {"sp": "spp", "root": "sift"}
# of what is read; 0, nothing: not given
READER_KEYS = {"rawdata_dir": None, "dataset_dir": None, "num_kpt": 0}
EVALUATOR_KEYS = {"num_pair": 0}
EVAL_UNUSED = {"reader": ("name",), "evaluator": ("name", "rescale", "inlier_th")}


def _check_keys(values: dict, known, source: str, section: str = "") -> None:
    check_keys([section + key for key in values], [section + key for key in known], f"{source}, of the original's form")


def _section(values: dict, name: str, known, source: str) -> dict:
    section = values.get(name) or {}
    if not isinstance(section, dict):
        raise InputError(f"{source}: {name} should hold keys and values, not {str(section)[:100]!r}")
    _check_keys(section, known, source, f"{name}.")
    return section


def _name_unused(unused: list[str], source: str) -> None:
    if unused:
        print(f"note: {source}: not needed here and ignored: {', '.join(unused)}", file=sys.stderr)


def is_dump_config(values: dict) -> bool:
    """Whether `values` of a YAML file are those that the original made features with."""
    return "data_name" in values


def from_dump_config(values: dict, source: str) -> dict:
    """The YAML that the original made features with -> keys of `dump.dump`, `workers` among them."""
    _check_keys(values, [*DUMP_KEYS, *DUMP_UNUSED, "data_split", "dataset_dump_dir", "extractor"], source)
    extractor = _section(values, "extractor", EXTRACTOR_KEYS, source)
    if values.get("data_split", ["test"]) not in ("test", ["test"]):
        raise InputError(f"{source}: data_split {values['data_split']!r}: only ['test'] is known")
    config = {ours: values[key] for key, ours in DUMP_KEYS.items() if key in values} | {"extractor": {}}
    name = extractor.get("name")
    if name is not None:
        config["feature_type"] = FEATURES.get(name, name) if isinstance(name, str) else name
    if "num_kpt" in extractor:
        config["extractor"]["max_keypoints"] = extractor["num_kpt"]
    if "resize" in extractor:
        sides = extractor["resize"] if isinstance(extractor["resize"], list) else [extractor["resize"]]
        config["resize"] = [] if sides in ([None], [-1]) else sides[::-1]  # height first
    if "num_process" in extractor:
        config["workers"] = extractor["num_process"]
    if "det_th" in extractor and name in ("root", "sift"):
        config["extractor"]["contrast_threshold"] = extractor["det_th"]
    elif "det_th" in extractor:
        print(f"note: {source}: det_th has no effect on sp, as in the original", file=sys.stderr)
    if values.get("dataset_dump_dir"):
        file = f"{values['data_name']}_{name}_{extractor.get('num_kpt')}.hdf5"
        config["output"] = str(Path(str(values["dataset_dump_dir"]), file))
    _name_unused([key for key in [*values, *extractor] if key in DUMP_UNUSED], source)
    return config


def is_eval_config(values: dict) -> bool:
    """Whether `values` of a YAML file are those that the original evaluated with."""
    return "reader" in values or "evaluator" in values


def from_eval_config(values: dict, source: str) -> dict:
    """The YAML that the original evaluated with -> raw_data_dir and output (the HDF5 file), None where it names none;
    max_keypoints of an image and limit (pairs), None for all."""
    _check_keys(values, [*EVAL_UNUSED, "matcher"], source)
    unused = [key for key in values if key == "matcher"]
    sections = []
    for name, known in (("reader", READER_KEYS), ("evaluator", EVALUATOR_KEYS)):
        section = _section(values, name, [*known, *EVAL_UNUSED[name]], source)
        unused += [f"{name}.{key}" for key in section if key in EVAL_UNUSED[name]]
        sections.append(overlay(known, {key: section[key] for key in section if key in known}, f"{source}, {name}"))
    _name_unused(unused, source)
    reader, evaluator = sections
    return {"raw_data_dir": reader["rawdata_dir"], "output": reader["dataset_dir"],
            "max_keypoints": max(reader["num_kpt"], 0) or None, "limit": max(evaluator["num_pair"], 0) or None}
