"""The knobs of training, with what they are when a config does not say."""
from tools.cli import InputError
from tools.config import load_config

DEFAULTS = {
    # data
    "base_path": "data/megadepth_sift",  # a dump of dump.dump_megadepth
    "scene_list_fn": None,  # file of scene ids to train on; None: all of the dump
    "val_scene_list_fn": None,  # file of scene ids to validate on; None: no validation
    "val_pairs": 200,
    "feature": "sift",  # sift or spp
    "pairs_per_scene": 80,
    "max_keypoints": 1024,
    "min_inliers": 32,
    "max_inliers": 512,
    "random_inliers": True,  # draw the number of true matches, rather than taking max_inliers
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
    "warmup_its": 0,  # steps over which lr rises from 0: Adam's first steps are all of full size, and undo a warm init
    "decay_rate": 0.999992,
    "decay_iter": 200000,
    "batch_size": 16,  # over all processes
    "epochs": 10000,
    "its_per_epoch": 1000,  # steps; -1: as many as one draw of pairs gives
    # pose-consistency loss
    "with_pose": False,
    # The pose loss, which is 0.1 at most, then adds 1 at most. On small scenes its gradient was 0.1 to 1.5 times the
    # matching loss's once most matches were right, and less before.
    "pose_weight": 10.0,
    "pose_start": 20000,  # steps after which it is switched on: by then matches are good enough for eight points
    "max_minutes": 0.0,  # stop cleanly after so long; 0: no limit
    "seed": 0,
    # machine
    "gpu": [],  # which GPUs; []: all there are, or the CPU; [-1]: the CPU
    "workers": 4,  # sample-making processes, over all processes of the job
    # results
    "save_path": "runs/train",
    "resume_path": None,  # a checkpoint, or the save_path of an earlier run, to go on from
    "keep_checkpoints": 3,  # how many of the epochs' checkpoints to keep, besides latest and best
}

CHOICES = {
    "feature": ("sift", "spp"),
    "network": ("gm", "imp", "dgnns", "eimp", "adagmn"),
    "norm_fn": ("in", "bn"),
    "ac_fn": ("relu", "gelu", "lrelu"),
    "init": ("published", "warm"),
    "optim": ("adam", "adamw"),
}
LEAST = {"val_pairs": 1, "pairs_per_scene": 1, "max_keypoints": 1, "min_inliers": 0, "layers": 1, "batch_size": 1,
         "sinkhorn_iterations": 1, "workers": 0, "warmup_its": 0, "keep_checkpoints": 1, "epochs": 1, "seed": 0,
         "pose_weight": 0, "pose_start": 0}


def load_train_config(path, arguments: list[str]) -> dict:
    """Defaults, a JSON file and command-line overrides -> the configuration; InputError names what is wrong in it."""
    config = load_config(path, DEFAULTS, arguments)
    for key, choices in CHOICES.items():
        if config[key] not in choices:
            raise InputError(f"{key} {config[key]!r}: expected one of {', '.join(choices)}")
    for key, least in LEAST.items():
        if config[key] < least:
            raise InputError(f"{key} {config[key]}: expected at least {least}")
    if config["min_inliers"] > config["max_inliers"]:
        raise InputError(f"min_inliers {config['min_inliers']} is more than max_inliers {config['max_inliers']}")
    if config["its_per_epoch"] != -1 and config["its_per_epoch"] < 1:
        raise InputError(f"its_per_epoch {config['its_per_epoch']}: expected a number of steps, or -1")
    return config
