"""A configuration -> where its samples come from: a dump, or images and dumps mixed."""
from pathlib import Path

from tools.cli import InputError
from tools.files import read_lines
from tools.manifest import manifest_path
from training.data import Choice, DumpSource, Labels, Samples
from training.online import PhotoSource, SceneSource, pairs_of_views

MIN_MATCHES = 21  # true ones, of a pair made on the fly


def _open_dump(config: dict, path, scenes, pairs_per_scene: int, seed: int, labels: Labels | None) -> DumpSource:
    source = DumpSource(path, scenes, pairs_per_scene, seed, labels)
    if source.feature_type != config["feature"]:
        raise InputError(f"{path} holds {source.feature_type} features, the config says feature {config['feature']}")
    return source


def _choice(config: dict, **least: int) -> Choice:
    names = ("max_keypoints", "min_inliers", "max_inliers", "random_inliers")
    return Choice(**{name: config[name] for name in names}, **least)


def dump_samples(config: dict, path, scene_list_fn, pairs_per_scene: int, seed: int) -> Samples:
    """Samples from the scenes of a dump that are in a list file (None: all)."""
    scenes = read_lines(scene_list_fn) if scene_list_fn else None
    source = _open_dump(config, path, scenes, pairs_per_scene, seed, None)
    least, n = source.min_keypoints, config["max_keypoints"]
    if least < n:
        raise InputError(f"{path} admits images with {least} keypoints, a sample takes {n}: dump with --min_keypoints "
                         f"{n}, or train with max_keypoints {least}")
    return Samples([source], _choice(config), seed)


def online_samples(config: dict) -> Samples:
    """Samples made on the fly from photographs and MegaDepth's layout, mixed with those of dumps."""
    labels = Labels(config["inlier_th"], config["outlier_th"]) if config["outlier_th"] else None
    entries = config["online_sources"] or [{"path": config["base_path"], "scene_list_fn": config["scene_list_fn"]}]
    sources = []
    for entry in entries:
        path, scenes = Path(entry["path"]), read_lines(entry["scene_list_fn"]) if entry.get("scene_list_fn") else None
        if not path.is_dir():
            raise InputError(f"{path} is not a folder: online training takes photographs, MegaDepth's layout or a dump")
        if manifest_path(path).is_file():
            sources.append(_open_dump(config, path, scenes, config["pairs_per_scene"], config["seed"], labels))
        elif (path / "scene_info").is_dir():
            sources.append(SceneSource(path, scenes, config))
        else:
            sources.append(PhotoSource(path, config))
    choice = _choice(config, min_keypoints=config["min_keypoints"], min_matches=MIN_MATCHES)
    weights = [float(entry.get("weight", 1)) for entry in entries]
    return Samples(sources, choice, config["seed"], weights, pairs_of_views(config))


def training_samples(config: dict) -> Samples:
    """What a run trains on."""
    if config["online"]:
        return online_samples(config)
    return dump_samples(config, config["base_path"], config["scene_list_fn"], config["pairs_per_scene"],
                        config["seed"])


def validation_samples(config: dict, training_scenes: list[str]) -> Samples | None:
    """What a run validates on, the same in every run; None if the configuration names nothing.

    InputError if a scene of it is trained on.
    """
    if not config["val_path"] and not config["val_scene_list_fn"]:
        return None
    samples = dump_samples(config, config["val_path"] or config["base_path"], config["val_scene_list_fn"],
                           config["val_pairs"], seed=10 ** 6)
    shared = set(samples.scenes) & set(training_scenes)
    if shared:
        raise InputError(f"scene {min(shared)} is in both the training and the validation scenes")
    return samples
