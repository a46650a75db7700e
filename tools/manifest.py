"""What a dump says of itself: which settings made it, where its files are, which scenes are complete.

    OUT/
      dump.json                {"format": "imp-dump", "version": 1, "feature_type": ..., "settings": {...}}
      keypoints/<scene>/<image file name with extension>_<feature>.npy
      matches/<scene>/<i>.npy  i = 0 .. n-1
      scenes/<scene>.json      {"pairs": n, "images": m, ...}; written last: its presence says the scene is complete

While a process writes a scene, OUT/.<scene>.lock is there too.
"""
import reprlib
from pathlib import Path, PurePosixPath

from tools.cli import InputError
from tools.features import FEATURE_TYPES
from tools.files import check_folder, read_json, write_json
from tools.locks import locked

FORMAT = "imp-dump"
VERSION = 1
IMPLIED = {"align_corners": True, "inlier_th": 5.0, "precision": "float32"}
MOST_PAIRS = 10 ** 7  # of a scene: they are shuffled in memory


def is_count(value) -> bool:
    """Whether it is a whole number of something."""
    return type(value) is int and 0 <= value < 2 ** 63


def is_list_of(*types):
    """A check for lists of lists [a, b, ...] of these types."""
    return lambda value: isinstance(value, list) and all(
        isinstance(row, list) and [type(part) for part in row] == list(types) for row in value)


# What is read of each file, for check_fields; what has None for a missing value must be there. Dumps that were
# imported, or made by early versions, count less.
MANIFEST_FIELDS = {"feature_type": (lambda value: value in tuple(FEATURE_TYPES), None),
                   "settings": (lambda value: isinstance(value, dict), None)}
SETTINGS_FIELDS = {"min_keypoints": (is_count, None),
                   "descriptor_dtype": (lambda value: value in ("float16", "float32"), "float16")}
SCENE_FIELDS = {"pairs": (lambda value: is_count(value) and value <= MOST_PAIRS, None), "images": (is_count, None),
                **dict.fromkeys(("candidate_pairs", "candidate_images", "few_keypoints", "bytes", "keypoint_bytes"),
                                (is_count, 0)),
                "rejected": (lambda value: isinstance(value, dict) and all(map(is_count, value.values())), {}),
                "skipped": (is_list_of(str, str), [])}


def manifest_path(path) -> Path:
    """The file that says what made the dump `path`."""
    return Path(path) / "dump.json"


def scene_path(path, scene: str) -> Path:
    """The file that says that `scene` of the dump `path` is complete, and its counts."""
    return Path(path) / "scenes" / f"{scene}.json"


def keypoint_path(path, scene: str, image_path: str, feature_type: str) -> Path:
    """The keypoint record of the image that a match record calls `image_path`."""
    return Path(path) / "keypoints" / scene / f"{PurePosixPath(image_path).name}_{feature_type}.npy"


def match_path(path, scene: str, index: int) -> Path:
    """The match record of a scene's valid pair `index` = 0 .. n-1."""
    return Path(path) / "matches" / scene / f"{index}.npy"


def check_fields(content, fields: dict, where) -> dict:
    """`content`, read from the file `where`, with what it lacks; InputError if it is not a dict, or a value cannot be.

    fields: name -> (whether a value can be its, what stands for a missing one). Others are left as they are.
    """
    if not isinstance(content, dict):
        raise InputError(f"{where} is damaged: it holds no JSON object")
    for name, (is_valid, default) in fields.items():
        if not is_valid(content.get(name, default)):
            raise InputError(f"{where} is damaged: its {name} is {reprlib.repr(content.get(name))}")
    return {**{name: default for name, (_, default) in fields.items()}, **content}


def check_settings(made: dict, wanted: dict, where) -> None:
    """Raise InputError that names the first setting in which `made`, found at `where`, differs from `wanted`.

    Both are dicts whose entry "settings", if there is one, is a dict of more of the same. A setting that `made` is too
    old to have is as IMPLIED.
    """
    made = check_fields({"settings": {}, **made}, {"settings": MANIFEST_FIELDS["settings"]}, where)
    made, wanted = ({**content, **content.get("settings", {}), "settings": None} for content in (made, wanted))
    for name in {**wanted, **made}:
        before, now = made.get(name, IMPLIED.get(name)), wanted.get(name)
        if before != now:
            raise InputError(f"{where} was made with {name} {before}, now it is {now}: give the same settings, or "
                             "write elsewhere")


def claim(path, manifest: dict) -> None:
    """Mark the folder `path` as made by `manifest`, or check that it was, so that what is there is resumed.

    Raises InputError if another setting or version made it, or if something else is in it.
    """
    file = manifest_path(path)
    check_folder(path)
    with locked(Path(path) / f".{file.name}.lock"):
        for stray in Path(path).glob(f".{file.stem}.*.tmp{file.suffix}"):
            stray.unlink()
        if not file.exists():
            if any((Path(path) / name).exists() for name in ("keypoints", "matches", "scenes")):
                raise InputError(f"{path} holds a dump without {file.name}, made by something else: write elsewhere")
            write_json(file, manifest)
    check_settings(check_fields(read_json(file), {}, file), manifest, path)


def read_manifest(path) -> dict:
    """The manifest of the dump `path`; InputError if the folder is not a dump, or one of another version."""
    file = manifest_path(path)
    if not file.is_file():
        raise InputError(f"{path} is not a dump: it has no {file.name}; make one with dump.dump_megadepth")
    manifest = check_fields(read_json(file), {}, file)
    if (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise InputError(f"{file} is of format {manifest.get('format')} version {manifest.get('version')}, "
                         f"not {FORMAT} {VERSION}: run dump.dump_megadepth again")
    settings = check_fields(check_fields(manifest, MANIFEST_FIELDS, file)["settings"], SETTINGS_FIELDS, file)
    return {**manifest, "settings": settings}


def read_scene(path, scene: str) -> dict:
    """The counts of a complete scene (see `dump.dump_megadepth.dump_scene`); InputError if the file is damaged."""
    file = scene_path(path, scene)
    return check_fields(read_json(file), SCENE_FIELDS, file)


def begun_scenes(path) -> list[str]:
    """Scenes that the dump has begun, complete or not, sorted."""
    folders = [folder.name for name in ("keypoints", "matches") for folder in Path(path, name).glob("*")]
    return sorted({*folders, *(file.stem for file in Path(path, "scenes").glob("[!.]*.json"))})


def load_dump(path, scenes=None) -> dict:
    """What there is to train on in the dump `path`.

    scenes: the ids wanted, in that order; all complete ones if None. Returns {"feature_type", "settings",
    "scenes": {scene: number of pairs, never 0}, "incomplete": [unfinished scenes, when none are asked for]}. Raises
    InputError for a folder that is not a dump, for scenes asked for that are unfinished, and if there is no pair.
    """
    manifest = read_manifest(path)
    begun = begun_scenes(path) if scenes is None else scenes
    incomplete = [scene for scene in begun if not scene_path(path, scene).is_file()]
    if scenes is not None and incomplete:
        raise InputError(f"{path} lacks {len(incomplete)} of the {len(begun)} scenes asked for "
                         f"({', '.join(incomplete[:5])}): run dump.dump_megadepth on it again")
    counts = {scene: read_scene(path, scene)["pairs"] for scene in begun if scene not in incomplete}
    counts = {scene: pairs for scene, pairs in counts.items() if pairs}
    if not counts:
        unfinished = f"; unfinished scenes: {', '.join(incomplete[:5])}" if incomplete else ""
        raise InputError(f"{path} has no pairs{unfinished}")
    return {"feature_type": manifest["feature_type"], "settings": manifest["settings"], "scenes": counts,
            "incomplete": incomplete}
