"""Weights of our own for ALIKED, from photographs and an RGB-D sequence to tables: what `make weights` runs.

    python3 -m training.weights --photos DIR --kitchen DIR --minutes 600 [--key value ...]

Each stage is a command that resumes what it finds, so the same command continues what was stopped. The stages of SHARES
divide the minutes; each ends when its time is over, and is not taken up again. Keys are settings of training:
`--gpu 0 --precision bfloat16 --batch_size 64`, say. Data go to data/open_aliked, all else to runs/open_aliked.
"""
import argparse
import contextlib
import subprocess
import sys
import time
from pathlib import Path

from tools.cli import InputError, number, run, whole_number
from tools.files import read_json, write_bytes, write_json
from tools.manifest import check_fields
from tools.pretrained import find_pretrained
from tools.processes import stop_on_sigterm
from training.config import load_train_config
from training.state import read_state

DATA, RUNS = Path("data/open_aliked"), Path("runs/open_aliked")
CONFIG = "configs/config_train_open_aliked.json"
SHARES = {"scenes": 0.1, "features": 0.2, "imp": 0.4, "imp_decay": 0.1, "eimp": 0.2}  # of the minutes
MOST_SCENES, HELDOUT_SCENES = 1000, 20
SCENE_OPTIONS = ("--images_per_scene", 10)
FEATURE_OPTIONS = ("--max_keypoints", 2000, "--min_keypoints", 1024)
FIRST_VAL = 700  # number of the frame from which on the sequence is held out
FINAL_LR = 0.02  # share of the learning rate that is left at the end of imp_decay and eimp
POLL_SECONDS = 2


class Clock:
    """Seconds that each stage of SHARES took in all runs, and which are done; kept in a file."""

    def __init__(self, path: Path, minutes: float):
        content = read_json(path) if path.exists() else {}
        content = check_fields(content, {
            "done": (lambda value: isinstance(value, list), []),
            "seconds": (lambda value: isinstance(value, dict) and {type(s) for s in value.values()} <= {int, float},
                        {})}, path)
        self.path, self.minutes, self.seconds, self.done = path, minutes, content["seconds"], content["done"]

    def save(self) -> None:
        write_json(self.path, {"seconds": self.seconds, "done": self.done})

    def budget(self, stage: str) -> float:
        """Seconds of a stage: its share of what the stages before it have left."""
        stages = list(SHARES)
        place = stages.index(stage)
        left = 60 * self.minutes - sum(self.seconds.get(name, 0) for name in stages[:place])
        return max(0, left) * SHARES[stage] / sum(SHARES[name] for name in stages[place:])

    def spend(self, stage: str, seconds: float) -> bool:
        """Add to a stage's seconds; whether its time is over."""
        self.seconds[stage] = self.seconds.get(stage, 0) + seconds
        self.save()
        return self.seconds[stage] >= self.budget(stage)


def call(*command, is_over=lambda seconds: False) -> None:
    """Run `python3 -m command` until it ends or is_over(seconds since the last time it was asked) says so.

    InputError if it fails.
    """
    command, stopped = [sys.executable, "-m", *map(str, command)], False
    print("+", *command[1:], flush=True)
    process = subprocess.Popen(command)
    try:
        while process.poll() is None:
            started = time.monotonic()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL_SECONDS)
            if is_over(time.monotonic() - started) and not stopped:
                process.terminate()  # what is done is kept, by each of them
                stopped = True
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if process.returncode not in (0, 1) and not stopped:  # 1: some items were skipped, and listed
        raise InputError(f"{command[2]} ended with status {process.returncode}; what is done is kept")


def call_stage(clock: Clock, stage: str, result: Path, *command) -> None:
    """The command of a stage of SHARES, within its time, unless it is done. result: a pattern of what it has to give.
    """
    if stage in clock.done:
        return
    call(*command, is_over=lambda seconds: clock.spend(stage, seconds))
    if not any(result.parent.glob(result.name)):
        raise InputError(f"{stage} gave no {result} in {clock.seconds[stage]:.0f} seconds: run again with more "
                         "--minutes")
    clock.done.append(stage)
    clock.save()


def make_data(clock: Clock, photos: Path, kitchen: Path) -> None:
    """Photographs, scenes textured with them and the first frames of the sequence to train on; the rest held out."""
    link, scenes, frames = DATA / "photos", DATA / "scenes", DATA / "kitchen"
    DATA.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(photos.resolve(), target_is_directory=True)
    sequence = ("dump.import_rgbd", "--sequence_path", kitchen, "--save_path", frames, "--scene")
    call(*sequence, "kitchen_train", "--last", FIRST_VAL - 1)
    call(*sequence, "kitchen_val", "--first", FIRST_VAL, "--eval_pairs", 200)
    call("dump.make_scenes", *SCENE_OPTIONS, "--save_path", DATA / "heldout", "--scenes", HELDOUT_SCENES,
         "--first_scene", MOST_SCENES, "--pairs", 10, "--layouts", "scannet")
    call_stage(clock, "scenes", scenes / "scenes/*.json",
               "dump.make_scenes", *SCENE_OPTIONS, "--save_path", scenes, "--scenes", MOST_SCENES, "--layouts",
               "megadepth", "--textures", link, "--seed", 7)
    if "features" not in clock.done:
        features = ("dump.dump_megadepth", "--feature_type", "aliked", *FEATURE_OPTIONS, "--base_path")
        scene_list = DATA / "kitchen_train.txt"
        write_bytes(scene_list, b"kitchen_train\n")
        # one scene, of no use in part: it takes the time that it needs
        call(*features, frames, "--save_path", DATA / "kitchen_aliked", "--scene_list", scene_list,
             is_over=lambda seconds: clock.spend("features", seconds) and False)
        call_stage(clock, "features", DATA / "scenes_aliked/scenes/*.json",
                   *features, scenes / "megadepth", "--save_path", DATA / "scenes_aliked")


def train(clock: Clock, stage: str, keys: list[str], *own) -> None:
    """A stage of training: with the user's keys, then those of its own."""
    folder = RUNS / stage
    call_stage(clock, stage, folder / "latest.pth",
               "train", "--config", CONFIG, "--save_path", folder, "--resume_path", folder, *keys, *own)


def train_networks(clock: Clock, keys: list[str]) -> None:
    """IMP at a constant learning rate; from there IMP, and EIMP, at a falling one and with the pose loss."""
    train(clock, "imp", keys)
    steps_a_second = read_state(RUNS / "imp")["step"] / clock.seconds["imp"]
    for stage, network in (("imp_decay", "imp"), ("eimp", "eimp")):
        config = RUNS / stage / "config.json"
        steps = max(1, steps_a_second * clock.budget(stage))
        rate = read_json(config)["decay_rate"] if config.exists() else FINAL_LR ** (1 / steps)
        train(clock, stage, keys, "--network", network, "--weight_path", RUNS / "imp/latest.pth", "--warmup_its", 10,
              "--decay_iter", 0, "--decay_rate", rate, "--with_pose", 1, "--pose_start", 0)
    for stage, network in (("imp_decay", "imp"), ("eimp", "eimp")):
        call("tools.export_weights", RUNS / stage / "latest.pth", weights_file(network), "--scenes", "photographs",
             "procedural_scenes", "kitchen_train")


def weights_file(network: str) -> Path:
    return RUNS / f"{network}_aliked_open.pth"


def evaluate(scannet: Path | None, limit: int) -> None:
    """Both networks beside nearest neighbours and LightGlue, on what was held out; then whether they are any good."""
    frames, heldout = DATA / "kitchen", DATA / "heldout/scannet"
    sets = {"kitchen": ("--pairs", frames / "pairs/kitchen_val.txt", "--image_dir",
                        frames / "Undistorted_SfM/kitchen_val/images"),
            "procedural": ("--dataset", "scannet", "--pairs", heldout / "pairs.txt", "--image_dir", heldout)}
    if scannet:
        sets["scannet15"] = ("--pairs", scannet / "pairs_with_gt.txt", "--image_dir", scannet / "images", "--resize",
                             640, 480)
    methods = {"NN": None, "IMP": weights_file("imp"), "EIMP": weights_file("eimp"),
               "LightGlue": find_pretrained("aliked_lightglue.pth")}
    for name, pairs in sets.items():
        if not (RUNS / name / "results.json").exists():
            call("eval.eval_imp", "--matching_method", *methods, "--weights", *list(methods.values())[1:],
                 "--use_iterative", "--feature_type", "aliked", "--max_keypoints", 1024, "--estimator", "poselib",
                 "--threshold", 3, "--limit", limit, "--pictures", 0, "--save_path", RUNS / name, *pairs)
    tables = {name: read_json(RUNS / name / "results.json")["tables"][0]["methods"] for name in sets}
    print("gain of AUC@20 over nearest neighbours, 95% of a bootstrap over the same pairs:")
    for method in ("IMP", "IMP iterative", "EIMP", "EIMP iterative"):
        gains = {name: table[method]["auc_gain_interval"]["20"] for name, table in tables.items()}
        print(f"  {method}: " + ", ".join(f"{name} {100 * low:+.1f} to {100 * high:+.1f}"
                                          for name, (low, high) in gains.items())
              + (": better on each" if all(low > 0 for low, _ in gains.values()) else ": not better on each"))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="training.weights", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--photos", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--kitchen", type=Path, required=True,
                        help="RGB-D sequence as dump.import_rgbd takes it; frames from 700 on are held out")
    parser.add_argument("--scannet", type=Path, help="also evaluate on its pairs_with_gt.txt and images/")
    parser.add_argument("--minutes", type=number(0.01), required=True,
                        help="for scenes, features and training together; evaluation comes after them")
    parser.add_argument("--eval_pairs", type=whole_number(1), default=200, help="of each set, at most (200)")
    args, keys = parser.parse_known_args(argv)
    load_train_config(CONFIG, keys)  # a mistake in them must not show after the data are made
    if not args.photos.is_dir():
        raise InputError(f"--photos {args.photos} is not a folder")
    stop_on_sigterm()
    clock = Clock(RUNS / "clock.json", args.minutes)
    make_data(clock, args.photos, args.kitchen)
    train_networks(clock, keys)
    evaluate(args.scannet, args.eval_pairs)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
