"""Names of packages, and where files that ship are found."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

import imp_matching
from tools import checkpoint
from tools.files import find_shipped, read_lines
from tools.pair_list import read_pair_list

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("first, ok", [("import eval.metrics", True), ("import tools; import eval.metrics", False)])
def test_a_folder_of_the_name_of_our_package_is_no_hindrance(first, ok, tmp_path):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "__init__.py").write_text("")
    code = f"import sys; sys.path.append({str(ROOT)!r}); {first}; import tools.cli"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode == 0) == ok
    assert ok or "is imported as tools, a name that imp-matching's package" in done.stderr


def test_files_that_ship_are_found(tmp_path, monkeypatch):
    assert (imp_matching.shipped("weights") / "imp_sift_open.pth").is_file()
    monkeypatch.chdir(tmp_path)
    assert find_shipped("configs/config_train_demo.json", "configs").is_file()
    assert find_shipped("/nowhere/config_train_demo.json", "configs") == Path("/nowhere/config_train_demo.json")
    assert read_lines("assets/megadepth_val.txt") == read_lines(ROOT / "assets" / "megadepth_val.txt")
    assert [pair.image0 for pair in read_pair_list("overview_pair.txt")]
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.yaml").write_text("a: 1")
    (tmp_path / "configs" / "config_train_demo.json").write_text("{}")
    assert find_shipped("mine.yaml", "configs") == Path("configs/mine.yaml")
    assert find_shipped("config_train_demo.json", "configs") == Path("configs/config_train_demo.json")
    assert find_shipped("elsewhere/mine.yaml", "configs") == Path("elsewhere/mine.yaml")
    (tmp_path / "config_train_demo.json").write_text("{}")
    assert find_shipped("config_train_demo.json", "configs") == Path("config_train_demo.json")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "imp_sift.pth").write_bytes(b"")
    monkeypatch.setenv("IMP_WEIGHTS", str(tmp_path / "mine"))
    assert checkpoint.default_weights("IMP", "sift") == tmp_path / "mine" / "imp_sift.pth"
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "imp_sift.pth").write_bytes(b"")
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path / "tools" / "weights")  # as where we are installed
    assert checkpoint.find_weights("imp_sift.pth") == tmp_path / "mine" / "imp_sift.pth"
    monkeypatch.delenv("IMP_WEIGHTS")
    assert checkpoint.find_weights("imp_sift.pth") == Path("weights/imp_sift.pth")


def test_imports_point_one_way():
    allowed = {"nets": set(), "tools": {"nets"}} | {name: {"nets", "tools"} for name in ("dump", "training", "eval")}
    for package in allowed:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [
                    alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                others = {name.partition(".")[0] for name in names} & allowed.keys() - {package}
                assert others <= allowed[package], path


def test_names_that_moved_are_importable_from_where_they_were():
    from eval import metrics, pose
    from tools.metrics import pose_auc
    from tools.pose import estimate_pose
    assert metrics.pose_auc is pose_auc and pose.estimate_pose is estimate_pose
