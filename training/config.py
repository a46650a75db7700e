"""The settings of training: what each is for, what it is where a config does not say, and what it may be."""
from typing import NamedTuple

from nets.losses import POSE_CLAMP, POSE_FORMS
from tools.cli import MOST_KEYPOINTS, InputError
from tools.config import load_config, overlay
from tools.correspondences import ONLINE_INLIER_TH
from tools.features import FEATURE_TYPES
from tools.precision import PRECISIONS

MOST = 2 ** 31


class Setting(NamedTuple):
    """least, most: of a number. None is a limit of the method: beyond them a run would only wait, or not start."""

    default: object
    help: str
    least: float = 0
    most: float = 2 ** 63
    choices: tuple[str, ...] = ()


SETTINGS = {
    # data
    "base_path": Setting("data/megadepth_sift", "dump of dump.dump_megadepth; online: also photographs, or MegaDepth's "
                                                "layout"),
    "scene_list_fn": Setting(None, "file of scene ids to train on; null: all of the dump"),
    "val_scene_list_fn": Setting(None, "file of scene ids to validate on; null: no validation"),
    "val_path": Setting(None, "dump to validate on; null: base_path, if there is val_scene_list_fn"),
    "val_pairs": Setting(200, "pairs of a validation", 1, MOST),
    "do_eval": Setting(False, "every eval_epochs, estimate poses of the validation pairs too, and draw some of them"),
    "eval_epochs": Setting(5, "see do_eval", 1, MOST),
    "val_images": Setting(None, "folder of the images of the validation dump, for pictures; null: no pictures"),
    "feature": Setting("sift", "local features", choices=tuple(FEATURE_TYPES)),
    "pairs_per_scene": Setting(80, "pairs drawn from each scene", 1, MOST),
    "max_keypoints": Setting(1024, "keypoints of a view in a sample", 1, 2 ** 30),
    "min_inliers": Setting(32, "true matches of a sample, at least"),
    "max_inliers": Setting(512, "true matches of a sample, at most"),
    "random_inliers": Setting(True, "draw the number of true matches, rather than taking all"),
    # samples made on the fly
    "online": Setting(False, "make samples on the fly from images"),
    "online_sources": Setting([], "what to mix, instead of base_path and scene_list_fn: a list of {path, weight (1), "
                                  "scene_list_fn (all)}"),
    "online_views": Setting(4, "views of a photograph or pair of images; each even one makes a sample with each odd "
                               "one", 2, 64),
    "view_size": Setting(640, "longer side of a view, pixels", 64, 2 ** 14),
    "extract_keypoints": Setting(2048, "strongest of a view, of which a sample takes max_keypoints", 1, MOST_KEYPOINTS),
    "min_keypoints": Setting(256, "keypoints of a view, at least: with fewer it is made again", 1, MOST),
    "contrast_threshold": Setting(0.005, "of sift"),
    "unique_locations": Setting(True, "sift: one keypoint per location"),
    "inlier_th": Setting(ONLINE_INLIER_TH, "reprojection error of a true match, at most, pixels"),
    "outlier_th": Setting(0.0, "reprojection error from which a keypoint is unmatched, pixels; those in between or "
                               "without depth are left out. 0: all without a true match are unmatched"),
    # network
    "network": Setting("imp", "matcher (dgnns: imp, adagmn: eimp)", choices=("gm", "imp", "dgnns", "eimp", "adagmn")),
    "layers": Setting(15, "iterations", 1, 1000),
    "norm_fn": Setting("in", "instance or batch norm", choices=("in", "bn")),
    "ac_fn": Setting("relu", "activation", choices=("relu", "gelu", "lrelu")),
    "with_sinkhorn": Setting(True, "false: dual softmax"),
    "sinkhorn_iterations": Setting(20, "of the assignment", 1, 10000),
    "match_threshold": Setting(0.2, "score of a match, at least", 0, 1),
    "n_min_tokens": Setting(256, "eimp: views with no more keypoints are not pooled"),
    "init": Setting("published", "warm: start as a nearest-neighbour matcher", choices=("published", "warm")),
    "weight_path": Setting(None, "checkpoint whose weights to start from"),
    # schedule
    "optim": Setting("adam", "optimiser", choices=("adam", "adamw")),
    "lr": Setting(1e-4, "learning rate"),
    "min_lr": Setting(1e-6, "learning rate at the end of the decay"),
    # A warm start makes these small; with all of lr, above 1e-4, Adam's steps are as large as a descriptor and undo it.
    "branch_lr": Setting(1.0, "share of lr for the last layer of each residual branch and of the keypoint encoder"),
    "warmup_its": Setting(0, "steps over which lr rises from 0: Adam's first steps are large, and undo a warm start"),
    # With small batches one pair in a hundred has a gradient ten times the others', and Adam then takes ten large steps
    # its way.
    "clip_grad": Setting(0.0, "norm of the gradient, at most; 0: no limit"),
    "decay_rate": Setting(0.999992, "factor of lr a step, after decay_iter"),
    "decay_iter": Setting(200000, "steps before lr decays"),
    "batch_size": Setting(16, "samples of a step, over all processes", 1, 2 ** 20),
    "epochs": Setting(10000, "epochs", 1, MOST),
    "its_per_epoch": Setting(1000, "steps of an epoch; -1: as many as one draw of pairs gives", -1, MOST),
    "max_minutes": Setting(0.0, "stop and save after so long; 0: no limit"),
    "seed": Setting(0, "of weights and samples", 0, 2 ** 63 - 1),
    # pose-consistency loss
    "with_pose": Setting(False, "add the pose-consistency loss"),
    # The pose loss, which is pose_clamp at most, then adds 1 at most. On small scenes its gradient was 0.1 to 1.5 times
    # the matching loss's once most matches were right, and less before.
    "pose_weight": Setting(10.0, "factor of the pose loss"),
    "pose_clamp": Setting(POSE_CLAMP, "squared distance of a true match to the pose, at most, in units of the focal "
                                      "length"),
    # plain: an earlier form of the paper's authors, of matches above 0.2 and without Hartley's normalisation; with it
    # go pose_clamp 5e-4, pose_weight 5000, pose_start 0
    "pose_form": Setting("normalised", "how the weighted eight-point algorithm is set up", choices=tuple(POSE_FORMS)),
    "pose_start": Setting(20000, "steps after which the pose loss begins: matches are then good enough"),
    # machine
    "gpu": Setting([], "numbers of GPUs; []: all there are, or the CPU; -1: the CPU"),
    "precision": Setting("float32", "bfloat16: autocast; assignment and pose stay in float32 or wider; tf32: products "
                                    "of float32 on a GPU", choices=PRECISIONS),
    "compile": Setting(False, "torch.compile of the network"),
    "deterministic": Setting(False, "the same run gives the same weights to the bit on GPUs too, more slowly"),
    "workers": Setting(4, "processes that make samples, over all processes of the job", 0, 1024),
    # results
    "save_path": Setting("runs/train", "folder of checkpoints, logs and curves"),
    "resume_path": Setting(None, "checkpoint or folder of an earlier run to resume; save_path itself: resume if there "
                                 "is anything"),
    "keep_checkpoints": Setting(3, "checkpoints of epochs to keep, besides latest and best", 1, MOST),
}
DEFAULTS = {key: setting.default for key, setting in SETTINGS.items()}
SOURCE = {"path": "", "weight": 1.0, "scene_list_fn": None}  # an entry of online_sources
# of the original's configurations
UNUSED = ("name", "dataset", "network_1", "network_2", "base_path_", "scene_list_fn_", "scene_list_fn_validation",
          "min_overlap_ratio", "max_overlap_ratio", "image_size", "pre_load", "error_th", "train", "optim_",
          "eval_config", "with_dist")


def load_train_config(path, arguments: list[str]) -> dict:
    """Defaults, a JSON file and command-line overrides -> the configuration; InputError names what is wrong in it."""
    config = load_config(path, DEFAULTS, arguments, UNUSED)
    for key, (_, _, least, most, choices) in SETTINGS.items():
        value = config[key]
        if choices and value not in choices:
            raise InputError(f"{key} {value!r}: expected one of {', '.join(choices)}")
        if type(value) in (int, float) and not least <= value <= most:
            expected = f"at least {least}" if value < least else f"at most {most}"
            raise InputError(f"{key} {str(value)[:40]}: expected {expected}")
    if not all(type(index) is int and index >= -1 for index in config["gpu"]):
        raise InputError(f"gpu {config['gpu']}: expected numbers of GPUs, or -1 for the CPU")
    if config["min_inliers"] > config["max_inliers"]:
        raise InputError(f"min_inliers {config['min_inliers']} is more than max_inliers {config['max_inliers']}")
    if 0 < config["outlier_th"] < config["inlier_th"]:
        raise InputError(f"outlier_th {config['outlier_th']} is less than inlier_th {config['inlier_th']}: expected at "
                         "least that, or 0")
    if config["online_views"] % 2:
        raise InputError(f"online_views {config['online_views']}: expected an even number")
    for entry in config["online_sources"]:
        if not isinstance(entry, dict) or "path" not in entry:
            raise InputError(f"online_sources: {entry!r} should be a mapping with a path")
        weight = overlay(SOURCE, entry, f"online_sources, {entry['path']}")["weight"]
        if weight <= 0:
            raise InputError(f"online_sources: weight {weight:g} of {entry['path']} should be a number above 0")
    if config["online_sources"] and not config["online"]:
        raise InputError("online_sources are given, but online is off: set online 1")
    if config["its_per_epoch"] == 0:
        raise InputError("its_per_epoch 0: expected a number of steps, or -1")
    return config
