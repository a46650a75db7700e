"""The knobs of training, with what they are when a config does not say."""
from nets.losses import POSE_CLAMP, POSE_FORMS
from tools.cli import MOST_KEYPOINTS, InputError
from tools.config import load_config

DEFAULTS = {
    # data
    "base_path": "data/megadepth_sift",  # a dump of dump.dump_megadepth; online also photographs, or MegaDepth's layout
    "scene_list_fn": None,  # file of scene ids to train on; None: all of the dump
    "val_scene_list_fn": None,  # file of scene ids to validate on; None: no validation
    "val_path": None,  # dump to validate on; None: base_path, if there is val_scene_list_fn
    "val_pairs": 200,
    "do_eval": False,  # every eval_epochs, estimate poses of the validation pairs too, and draw some of them
    "eval_epochs": 5,
    "val_images": None,  # folder that holds the images of the validation dump, for those pictures; None: none
    "feature": "sift",  # sift or spp
    "pairs_per_scene": 80,
    "max_keypoints": 1024,
    "min_inliers": 32,
    "max_inliers": 512,
    "random_inliers": True,  # draw the number of true matches, rather than taking all
    # samples made on the fly
    "online": False,
    # what to mix, instead of base_path and scene_list_fn: a list of {"path", "weight" (1), "scene_list_fn" (all)}
    "online_sources": [],
    "online_views": 4,  # of a photograph or a pair of images; half of them make samples with each of the other half
    "view_size": 640,  # longer side of a view, pixels
    "extract_keypoints": 2048,  # strongest of a view, of which a sample takes max_keypoints
    "min_keypoints": 256,  # a view with fewer is made again
    "contrast_threshold": 0.005,  # of sift
    "unique_locations": True,  # sift: one keypoint per place
    "inlier_th": 3.0,  # pixels between a keypoint and where its true match should be, at most
    # Keypoints count as unmatched if nothing lies so close to where their match should be, in pixels, and those in
    # between or without depth are left out, those of dumps too. 0: all that have no true match count, and a dump is
    # taken as it is.
    "outlier_th": 0.0,
    # network
    "network": "imp",  # gm, imp (or dgnns), eimp (or adagmn)
    "layers": 15,  # iterations
    "norm_fn": "in",  # in, bn
    "ac_fn": "relu",  # relu, gelu, lrelu
    "with_sinkhorn": True,  # False: dual softmax
    "sinkhorn_iterations": 20,
    "match_threshold": 0.2,
    "n_min_tokens": 256,  # views with no more keypoints are not pooled (eimp)
    "init": "published",  # warm: start as a nearest-neighbour matcher
    "weight_path": None,  # checkpoint whose weights to start from
    # schedule
    "optim": "adam",  # adam, adamw
    "lr": 1e-4,
    "min_lr": 1e-6,
    # Share of lr for the last layer of each residual branch and of the keypoint encoder. A warm start makes these
    # small; with all of lr, above 1e-4, Adam's steps are as large as a descriptor and undo it.
    "branch_lr": 1.0,
    "warmup_its": 0,  # steps over which lr rises from 0: Adam's first steps are all of full size, and undo a warm init
    # Norm of the gradient at most; 0: as it is. With small batches one pair in a hundred has a gradient ten times the
    # others', and Adam then takes ten large steps its way.
    "clip_grad": 0.0,
    "decay_rate": 0.999992,
    "decay_iter": 200000,
    "batch_size": 16,  # over all processes
    "epochs": 10000,
    "its_per_epoch": 1000,  # steps; -1: as many as one draw of pairs gives
    # pose-consistency loss
    "with_pose": False,
    # The pose loss, which is pose_clamp at most, then adds 1 at most. On small scenes its gradient was 0.1 to 1.5 times
    # the matching loss's once most matches were right, and less before.
    "pose_weight": 10.0,
    "pose_clamp": POSE_CLAMP,  # squared distance of a true match to the pose, at most, in units of the focal length
    # plain: an earlier form of the paper's authors, of matches above 0.2 and without Hartley's normalisation; with it
    # go pose_clamp 5e-4, pose_weight 5000, pose_start 0
    "pose_form": "normalised",
    "pose_start": 20000,  # steps after which it is switched on: by then matches are good enough for eight points
    "max_minutes": 0.0,  # stop cleanly after so long; 0: no limit
    "seed": 0,
    # machine
    "gpu": [],  # which GPUs; []: all there are, or the CPU; [-1]: the CPU
    "precision": "float32",  # bfloat16: autocast; the assignment and the pose stay in float32 or wider
    "compile": False,  # torch.compile of the layers
    "workers": 4,  # sample-making processes, over all processes of the job
    # results
    "save_path": "runs/train",
    # a checkpoint, or the save_path of an earlier run, to go on from; save_path itself: from where it is, if anywhere
    "resume_path": None,
    "keep_checkpoints": 3,  # how many of the epochs' checkpoints to keep, besides latest and best
}

CHOICES = {
    "feature": ("sift", "spp"),
    "network": ("gm", "imp", "dgnns", "eimp", "adagmn"),
    "norm_fn": ("in", "bn"),
    "ac_fn": ("relu", "gelu", "lrelu"),
    "init": ("published", "warm"),
    "optim": ("adam", "adamw"),
    "pose_form": tuple(POSE_FORMS),
    "precision": ("float32", "bfloat16"),
}
# What numbers may be: at least and at most; others: at least 0. None of the limits is one of the method's: beyond them
# a run would only wait, or not start.
RANGES = {"val_pairs": (1, 2 ** 31), "eval_epochs": (1, 2 ** 31), "pairs_per_scene": (1, 2 ** 31),
          "max_keypoints": (1, 2 ** 30), "extract_keypoints": (1, MOST_KEYPOINTS), "min_keypoints": (1, 2 ** 31),
          "online_views": (2, 64), "view_size": (64, 2 ** 14), "layers": (1, 1000), "sinkhorn_iterations": (1, 10000),
          "match_threshold": (0, 1), "batch_size": (1, 2 ** 20), "epochs": (1, 2 ** 31), "its_per_epoch": (-1, 2 ** 31),
          "workers": (0, 1024), "keep_checkpoints": (1, 2 ** 31), "seed": (0, 2 ** 63 - 1)}
# of the original's configurations
UNUSED = ("name", "dataset", "network_1", "network_2", "base_path_", "scene_list_fn_", "scene_list_fn_validation",
          "min_overlap_ratio", "max_overlap_ratio", "image_size", "pre_load", "error_th", "train", "optim_",
          "eval_config", "with_dist")


def _check_source(entry) -> None:
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise InputError(f"online_sources: {entry!r} should be a mapping with a path")
    unknown = set(entry) - {"path", "weight", "scene_list_fn"}
    if unknown:
        raise InputError(f"online_sources: unknown key {min(unknown)!r} for {entry['path']}: it may have weight and "
                         "scene_list_fn")
    weight = entry.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 2 ** 63:
        raise InputError(f"online_sources: weight {weight!r} of {entry['path']} should be a number above 0")


def load_train_config(path, arguments: list[str]) -> dict:
    """Defaults, a JSON file and command-line overrides -> the configuration; InputError names what is wrong in it."""
    config = load_config(path, DEFAULTS, arguments, UNUSED)
    for key, choices in CHOICES.items():
        if config[key] not in choices:
            raise InputError(f"{key} {config[key]!r}: expected one of {', '.join(choices)}")
    for key, value in config.items():
        if type(value) not in (int, float):
            continue
        least, most = RANGES.get(key, (0, 2 ** 63))
        if not least <= value <= most:
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
        _check_source(entry)
    if config["online_sources"] and not config["online"]:
        raise InputError("online_sources are given, but online is off: set online 1")
    if config["its_per_epoch"] == 0:
        raise InputError("its_per_epoch 0: expected a number of steps, or -1")
    return config
