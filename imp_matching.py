"""What is installed beside the five packages: their names kept ours, and the commands.

`nets`, `tools`, `dump`, `training` and `eval` are common names, and Python prefers a folder of that name where it is
started. Each of the five imports this module first: the others then come from where it lies.
"""
import sys
from functools import partial
from importlib import import_module
from importlib.util import spec_from_file_location
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PACKAGES = ("nets", "tools", "dump", "training", "eval")


def shipped(kind: str) -> Path:
    """The folder of the weights, configs or assets that ship: of the clone, or installed as data of `tools`."""
    return ROOT / kind if (ROOT / kind).is_dir() else ROOT / "tools" / kind


class _OwnPackages:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if path is None and name in PACKAGES:
            return spec_from_file_location(name, ROOT / name / "__init__.py",
                                           submodule_search_locations=[str(ROOT / name)])
        return None


def _claim_names():
    for name in PACKAGES:
        there = getattr(sys.modules.get(name), "__file__", None)
        if there and Path(there).resolve().parent != ROOT / name:
            raise ImportError(f"{there} is imported as {name}, a name that imp-matching's package {ROOT / name} needs: "
                              "import imp_matching first")
    sys.meta_path.insert(0, _OwnPackages)


def _run(module: str) -> int:
    from tools.cli import run

    return run(import_module(module).main)


match, evaluate, colmap, dump, train = (partial(_run, module) for module in (
    "eval.match_images", "eval.eval_imp", "eval.export_colmap", "dump.dump_megadepth", "train"))
_claim_names()
