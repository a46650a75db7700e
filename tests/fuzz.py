"""Damaged files of every kind that the project reads: each must end in a result, or in one line that says what is wrong.

    python3 tests/fuzz.py [--inputs 10000] [--seed 0] [--kind NAME ...] [--keep runs/fuzz] [--workers 2]

Small valid files are changed (tests/mutations.py) and given to the public loaders and to the commands, in processes
that are forked from this one, which has all modules loaded. An input fails if an exception other than InputError
reaches the boundary around a command or around one item of its work, if the process dies, takes longer than HANG
seconds or MEMORY bytes more than at its start, if a message has several lines, or if something is written outside the
folder of the results. The table at the end is a list of what to mend: each line a cause and a place in our code.
`--keep` gets the failing inputs: KIND-NUMBER/, the folder as the command saw it, with failure.txt in it. An input
depends on seed, kind and number alone: `--kind NAME --only NUMBER` does one again.
"""
import argparse
import contextlib
import faulthandler
import io
import json
import multiprocessing.connection
import os
import pickle
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import cv2  # noqa: E402
import h5py  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from eval_scene import list_set, make_scene, write_hdf5  # noqa: E402
from mutations import mutate  # noqa: E402
from PIL import Image  # noqa: E402
from plane_scene import K, poses, texture, view  # noqa: E402
from test_import_dump import make_old  # noqa: E402
from test_import_rgbd import write_frame  # noqa: E402
from tiny_dump import make_tiny_dump  # noqa: E402

import tools.cli  # noqa: E402
import train  # noqa: E402
from dump import dump, dump_megadepth, import_dump, import_rgbd  # noqa: E402
from eval import eval_imp, match_images  # noqa: E402
from eval.journal import Journal  # noqa: E402
from nets import SuperPoint, build_matcher  # noqa: E402
from tools import checkpoint, export_weights  # noqa: E402
from tools.cli import InputError, OutputError  # noqa: E402
from tools.exif import read_exif  # noqa: E402
from tools.files import read_depth, read_image, write_depth, write_image, write_json  # noqa: E402
from tools.geometry import opencv_to_colmap_K  # noqa: E402
from tools.scene_info import load_scene_info, read_megadepth1500, write_scene_info  # noqa: E402
from training import curves  # noqa: E402
from training.config import load_train_config  # noqa: E402
from training.data import Choice, DumpSource, Labels, Samples  # noqa: E402
from training.start import warm_start  # noqa: E402

HANG = 20  # seconds
MEMORY = 2 ** 30  # bytes
BATCH = 25  # inputs of one process
KINDS = {}


@dataclass
class Kind:
    """make(folder): writes valid files. use(folder): reads them; results go to folder/out. files: {glob: form}, the
    forms of mutations.FORMATS or None. share: of the inputs, for those that take long."""

    make: callable
    use: callable
    files: dict
    share: float = 1.0
    names_a_place: bool = False  # the file is the user's own and says where to write


def kind(files: dict, make, **options):
    """Register a function as the `use` of a kind that is called as it is."""
    def register(use):
        KINDS[use.__name__] = Kind(make, use, files, **options)
        return use
    return register


def command(main, *words) -> None:
    """Call a command as the shell does."""
    status = tools.cli.run(main, [str(word) for word in words])
    if status not in (0, 1, 2):
        raise AssertionError(f"status {status}")


@contextlib.contextmanager
def accepted():
    """Around a loader that may refuse what it is given."""
    try:
        yield
    except InputError as error:
        if "\n" in str(error):
            raise AssertionError(f"a message of several lines: {error}") from error


# the kinds; each `make` is called once, and is a view of the plane or a scene of the other tests, made small

def small(image, factor=2):
    return cv2.resize(image, None, fx=1 / factor, fy=1 / factor, interpolation=cv2.INTER_AREA)


HALF_K = np.diag([0.5, 0.5, 1]) @ K
SIZE = (160, 120)


def make_views(n=3) -> list:
    """(image, depth, pose) of n views of the plane, SIZE large."""
    picture = texture()
    return [(small(image), cv2.resize(depth, SIZE), pose) for pose in poses(n) for image, depth in [view(picture, pose)]]


def make_megadepth(folder):
    n, points = 3, {number: [0.0, 0.0] for number in range(25)}
    images, depths = [f"img/{i}.jpg" for i in range(n)], [f"depth/{i}.h5" for i in range(n)]
    views = make_views(n)
    for name, depth_name, (image, depth, _) in zip(images, depths, views):
        write_image(folder / name, image)
        write_depth(folder / depth_name, depth)
    write_scene_info(folder / "scene_info" / "0000.0.npz", {
        "image_paths": images, "depth_paths": depths, "intrinsics": [opencv_to_colmap_K(HALF_K)] * n,
        "poses": [pose for _, _, pose in views], "n_points3D": [25] * n, "points3D_id_to_2D": [points] * n,
        "points3D_id_to_ndepth": [dict.fromkeys(points, 1.0)] * n, "overlap_matrix": np.full((n, n), 0.5),
        "scale_ratio_matrix": np.ones((n, n)), "angles": np.zeros((n, n))})


def dump_scenes(folder, *options):
    command(dump_megadepth.main, "--feature_type", "sift", "--base_path", folder, "--save_path", folder / "out", "--min_keypoints", 30,
            "--max_keypoints", 100, "--workers", 1, *options)


@kind({"scene_info/*.npz": "npz"}, make_megadepth)
def scene_info(folder):
    with accepted():
        load_scene_info(folder / "scene_info" / "0000.0.npz")
    dump_scenes(folder)


def make_begun(folder):
    make_megadepth(folder)
    dump_scenes(folder)
    (folder / "out/scenes/0000.json").unlink()
    for path in sorted((folder / "out/matches/0000").iterdir())[2:]:
        path.unlink()


@kind({"out/*/0000/*.npy": "record", "out/dump.json": "json"}, make_begun)
def resumed_dump(folder):
    dump_scenes(folder)
    command(dump_megadepth.main, "--save_path", folder / "out", "--verify")


def make_dump(folder):
    make_tiny_dump(folder, ["0000"], pairs=3, images=3, n_keypoints=40, n_matches=20)
    write_json(folder / "dump.json", {"format": "imp-dump", "version": 1, "feature_type": "sift",
                                      "settings": {"min_keypoints": 40, "max_keypoints": 100, "descriptor_dtype": "float16"}})


@kind({"keypoints/*/*.npy": "record", "matches/*/*.npy": "record", "dump.json": "json", "scenes/*.json": "json"}, make_dump)
def training_dump(folder):
    for labels in (None, Labels(3.0, 8.0)):
        with accepted():
            samples = Samples([DumpSource(folder, labels=labels)], Choice(32, 4, 16))
            for k in range(3):
                samples[k]
    command(dump_megadepth.main, "--save_path", folder, "--verify")


def make_pairs(folder):
    """A pair list with its images and depth maps."""
    make_scene(folder)
    for path in folder.rglob("*.png"):
        write_image(path, small(cv2.imread(str(path), 0)))
    for path in folder.rglob("*.h5"):
        write_depth(path, small(read_depth(path)))
    lines = [line.split() for line in (folder / "pairs.txt").read_text().splitlines()]
    for line in lines:
        for place in (4, 6, 8, 9, 13, 15, 17, 18):
            line[place] = str(float(line[place]) / 2)
    (folder / "pairs.txt").write_text("\n".join(map(" ".join, lines[:2])) + "\n")


def evaluate(folder, *options, methods=("NN_ratio",)):
    command(eval_imp.main, "--matching_method", *methods, "--feature_type", "sift", "--save_path", folder / "out", "--device", "cpu",
            "--max_keypoints", 100, "--pictures", 0, "--threshold", 1, *options)


@kind({"pairs.txt": "text", "depths/*.h5": "hdf5"}, make_pairs)
def pair_list(folder):
    evaluate(folder, "--pairs", folder / "pairs.txt", "--image_dir", folder / "images", "--depth_dir", folder / "depths")
    command(match_images.main, folder / "pairs.txt", "--image_dir", folder / "images", "--matching_method", "NN_ratio", "--max_keypoints", 60,
            "--save_path", folder / "out")


def make_megadepth1500(folder):
    make_megadepth(folder)
    with np.load(folder / "scene_info/0000.0.npz", allow_pickle=True) as info:
        pairs = np.empty(2, object)
        pairs[:] = [[(0, 1), 0.5, [0.1]], [(1, 2), 0.5, [0.1]]]
        (folder / "lists").mkdir()
        np.savez(folder / "lists" / "0015_0.1_0.3.npz", pair_infos=pairs,
                 **{name: info[name] for name in ("image_paths", "depth_paths", "intrinsics", "poses")})


@kind({"lists/*.npz": "npz"}, make_megadepth1500)
def megadepth1500(folder):
    with accepted():
        read_megadepth1500(folder / "lists")
    evaluate(folder, "--dataset", "megadepth1500", "--pairs", folder / "lists", "--image_dir", folder)


def make_raw(folder):
    """Evaluation data as YFCC and as ScanNet have them."""
    test, scannet = folder / "yfcc100m/square/test", folder / "scannet/scene0707_00"
    for name in ("calibration", "images", "depths"):
        (test / name).mkdir(parents=True)
    for name in ("intrinsic", "extrinsic"):
        (scannet / name).mkdir(parents=True)
    views = make_views()
    for i, (image, depth, pose) in enumerate(views):
        write_image(test / f"images/im{i}.jpg", image)
        write_image(scannet / f"img/{15 * i}.jpg", image)
        write_depth(test / f"depths/im{i}.h5", depth)
        with h5py.File(test / f"calibration/c{i}.h5", "w") as file:
            file["K"], file["R"], file["T"], file["imsize"] = HALF_K, pose[:3, :3], pose[:3, 3], np.array([SIZE], np.float64)
        np.savetxt(scannet / f"intrinsic/{15 * i}.txt", HALF_K, fmt="%.6f")
        np.savetxt(scannet / f"extrinsic/{15 * i}.txt", np.linalg.inv(pose), fmt="%.6f")
    (test / "images.txt").write_text("".join(f"images/im{i}.jpg\n" for i in range(3)))
    (test / "calibration.txt").write_text("".join(f"calibration/c{i}.h5\n" for i in range(3)))
    (folder / "pairs").mkdir()
    (folder / "configs").mkdir()
    (folder / "pairs/square-te-1000-pairs.pkl").write_bytes(pickle.dumps([[0, 1], [1, 2]]))
    (folder / "pairs.txt").write_text("scene0707_00/img/0.jpg scene0707_00/img/15.jpg\n"
                                      "scans_test/scene0707_00/sens/frame-000015.color.jpg scene0707_00/img/30.jpg\n")
    settings = {"feature_type": "sift", "workers": 1, "extractor": {"max_keypoints": 80, "contrast_threshold": 0.02}}
    for name, more in (("yfcc", {"raw_data_dir": ".", "scenes": ["square"]}),
                       ("scannet", {"raw_data_dir": "scannet", "pair_list": "pairs.txt"})):
        (folder / f"configs/{name}.yaml").write_text(yaml.safe_dump({"dataset": name, "output": f"out/{name}.hdf5", **settings, **more}))
    for name, more in (("yfcc", {"rawdata_dir": ".", "data_seq": ["square"], "data_split": ["test"]}),
                       ("scannet", {"rawdata_dir": "scannet", "pair_list": "pairs.txt"})):
        (folder / f"configs/original_{name}.yaml").write_text(yaml.safe_dump({
            "data_name": name, "dataset_dump_dir": "out", "feature_dump_dir": "out", **more, "overwrite": False,
            "extractor": {"name": "root", "num_kpt": 80, "resize": [-1], "det_th": 0.02, "overwrite": False, "num_process": 1}}))


@kind({"pairs/*.pkl": "pkl", "yfcc100m/*/test/calibration/*.h5": "hdf5", "yfcc100m/*/test/images.txt": "text",
       "yfcc100m/*/test/calibration.txt": "text", "yfcc100m/*/test/depths/*.h5": "hdf5"}, make_raw)
def yfcc(folder):
    command(dump.main, "--config", "configs/yfcc.yaml")


@kind({"pairs.txt": "text", "scannet/*/intrinsic/*.txt": "text", "scannet/*/extrinsic/*.txt": "text"}, make_raw)
def scannet(folder):
    command(dump.main, "--config", "configs/scannet.yaml")
    evaluate(folder, "--dataset", "scannet", "--pairs", "pairs.txt", "--image_dir", "scannet")


@kind({"configs/*.yaml": "yaml"}, make_raw, names_a_place=True)
def evaluation_config(folder):
    path = changed(folder, "configs")
    with accepted():
        dump.load_config(path, ["--workers", "1"])
    with accepted():  # not all of dump.dump: a mistake may ask for much
        eval_imp.build_pair_set(eval_imp.parse_arguments(
            ["--matching_method", "NN", "--dataset", "yfcc", "--feature_type", "sift", "--config", str(path)]))


def make_parts(folder):
    make_raw(folder)
    with contextlib.chdir(folder):
        command(dump.main, "--config", "configs/yfcc.yaml")
        (folder / "yfcc100m/square/test/images/im2.jpg").unlink()  # so that the parts stay
        shutil.rmtree(folder / "out")
        command(dump.main, "--config", "configs/yfcc.yaml")
        (folder / "out/yfcc.hdf5").unlink()


@kind({"out/*.parts/**/*.npy": "record", "out/*.parts/**/*.json": "json"}, make_parts)
def dump_parts(folder):
    command(dump.main, "--config", "configs/yfcc.yaml")


def make_features(folder):
    make_pairs(folder)
    pairs = [pair for pair in read_pairs(folder)]
    write_hdf5(folder / "features.hdf5", list_set(folder, pairs, depth_dir=folder / "depths"))
    with h5py.File(folder / "features.hdf5", "r+") as file:  # fewer keypoints
        for name in ("kpt1", "kpt2", "desc1", "desc2", "depth1", "depth2"):
            for index in list(file[name]):
                values = file[name][index][:60]
                del file[name][index]
                file[name][index] = values
    torch.manual_seed(0)
    network = build_matcher("imp", descriptor_dim=128, n_layers=3)
    warm_start(network)
    checkpoint.save_checkpoint(folder / "warm.pth", {"model": network.state_dict(), "config": {"network": "imp"}, "scenes": ["sub"]})


def read_pairs(folder):
    from tools.pair_list import read_pair_list

    return read_pair_list(folder / "pairs.txt")


@kind({"features.hdf5": "hdf5"}, make_features)
def features(folder):
    evaluate(folder, "--dataset", "yfcc", "--hdf5", "features.hdf5", "--image_dir", "images", "--weights", "warm.pth", methods=("NN_ratio", "IMP"))


def make_journal(folder):
    make_features(folder)
    evaluate_features = ("--dataset", "yfcc", "--hdf5", "features.hdf5", "--image_dir", "images")
    add, kept = Journal.__exit__, folder / "kept.jsonl"

    def keep(journal, *arguments):
        shutil.copyfile(journal.path, kept)
        add(journal, *arguments)

    Journal.__exit__ = keep
    with contextlib.chdir(folder):
        evaluate(Path(), *evaluate_features)
    Journal.__exit__ = add
    lines = kept.read_text().splitlines()
    (folder / "out/journal.jsonl").write_text("\n".join(lines[:2]) + "\n")
    kept.unlink()


@kind({"out/journal.jsonl": "jsonl"}, make_journal)
def journal(folder):
    evaluate(Path(), "--dataset", "yfcc", "--hdf5", "features.hdf5", "--image_dir", "images")


@kind({"config.json": "json"}, lambda folder: shutil.copyfile(ROOT / "configs/config_train_online.json", folder / "config.json"),
      names_a_place=True)
def training_config(folder):
    with accepted():
        load_train_config(folder / "config.json", [])


def make_training(folder):
    make_dump(folder / "dump")
    write_json(folder / "config.json", {
        "layers": 2, "max_keypoints": 32, "min_inliers": 4, "max_inliers": 16, "batch_size": 2, "epochs": 2, "its_per_epoch": 1, "workers": 0,
        "gpu": [-1], "base_path": "dump", "save_path": "out", "val_pairs": 2})
    with contextlib.chdir(folder):
        command(train.main, "--config", "config.json", "--epochs", 1)


@kind({"out/latest.pth": "pth", "out/best.pth": "pth", "out/*.json": "json"}, make_training, share=0.4)
def resumed_training(folder):
    command(train.main, "--config", "config.json", "--resume_path", "out")


@kind({"out/events*": None, "out/*/events*": None}, make_training, share=0.3)
def training_curves(folder):
    command(curves.main, "out", "--save_path", "out/curves.png")


@kind({"dump/*/0000/*.npy": "record", "dump/dump.json": "json"}, make_training, share=0.3)
def training(folder):
    command(train.main, "--config", "config.json", "--save_path", "new")


def make_weights(folder):
    torch.manual_seed(0)
    network = build_matcher("imp", descriptor_dim=128, n_layers=2)
    checkpoint.save_checkpoint(folder / "weights.pth", {"model": network.state_dict(), "step": 3, "scenes": ["0000"], "min_loss": np.float64(3),
                                                        "config": {"network": "imp", "feature": "sift", "n_min_tokens": 60}})


@kind({"weights.pth": "pth"}, make_weights)
def weights(folder):
    with accepted():
        checkpoint.load_checkpoint(folder / "weights.pth")
    with accepted():
        checkpoint.load_matcher(folder / "weights.pth", "imp", 128)
    command(export_weights.main, "weights.pth", "out/small.pth")


@kind({"superpoint.pth": "pth"}, lambda folder: torch.save(SuperPoint().state_dict(), folder / "superpoint.pth"), share=0.5)
def superpoint(folder):
    with accepted():
        checkpoint.load_superpoint(folder / "superpoint.pth")


def make_results(folder):
    make_pairs(folder)
    (folder / "pairs.txt").write_text("a.png c.png\na.png sub/b.png\n")
    with contextlib.chdir(folder):
        match_list()


def match_list():
    command(match_images.main, "pairs.txt", "--image_dir", "images", "--matching_method", "NN_ratio", "--max_keypoints", 60, "--focal", 150,
            "--save_path", "out")


@kind({"out/*.npz": "npz"}, make_results)
def results(folder):
    match_list()


def make_images(folder):
    """One image in many formats, and photographs with EXIF data."""
    image, other = (cv2.merge([small(view(texture(), pose)[0], 3)] * 3) for pose in poses(2))
    image[:, :, 0] //= 2
    cv2.imwrite(str(folder / "other.png"), other)
    (folder / "images").mkdir()
    for suffix in ("png", "jpg", "tiff", "webp", "bmp", "ppm", "pgm", "jp2", "hdr", "exr", "pfm", "gif", "ras", "avif"):
        with contextlib.suppress(cv2.error):
            cv2.imwrite(str(folder / f"images/a.{suffix}"), image.astype(np.float32) / 255 if suffix in ("hdr", "exr", "pfm") else image)
    cv2.imwrite(str(folder / "images/deep.png"), image.astype(np.uint16) * 257)
    cv2.imwrite(str(folder / "images/float.tiff"), image.astype(np.float32))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif.get_ifd(0x8769).update({0x920A: 4.5, 0xA405: 28, 0xA002: 106, 0xA003: 80, 0xA20E: 8000.0, 0xA210: 2})
    Image.fromarray(image).save(folder / "images/photo.jpg", exif=exif)
    for path in (folder / "images").iterdir():
        if not path.stat().st_size:
            path.unlink()


@kind({"images/*": None}, make_images, share=1.5)
def images(folder):
    path = changed(folder, "images")
    for color in (False, True):
        with accepted():
            read_image(path, color)
    command(match_images.main, path, "other.png", "--matching_method", "NN_ratio", "--max_keypoints", 60, "--save_path", "out")


def changed(folder, name) -> Path:
    """Which file of folder/name is not as in the valid ones; the first if none is."""
    paths, valid = sorted((folder / name).iterdir()), folder.parent / "valid" / name
    return next((path for path in paths if not path.is_file() or not (valid / path.name).is_file()
                 or path.read_bytes() != (valid / path.name).read_bytes()), paths[0])


def make_exif(folder):
    """Photographs with odd tags, each another one."""
    make_images(folder)
    rng, photos = random.Random(0), folder / "photos"
    odd = [0, 1, 6, 9, 2 ** 16 - 1, 1e9, 0.0, 1e-9, (1, 0), (0, 0), (-1, 1), "a", b"\0\xff", (1, 2, 3)]
    photos.mkdir()
    for number in range(100):
        tags = Image.Exif()
        tags.get_ifd(0x8769).update({tag: rng.choice(odd) for tag in rng.sample([0x920A, 0xA405, 0xA002, 0xA003, 0xA20E, 0xA210], 4)})
        tags.update({tag: rng.choice(odd) for tag in rng.sample([0x0112, 0x010F, 0x011A], 2)})
        with contextlib.suppress(Exception):  # Pillow cannot write all
            Image.open(folder / "other.png").save(photos / f"{number}.jpg", exif=tags)
    for path in photos.iterdir():
        if not path.stat().st_size:
            path.unlink()


@kind({"photos/*.jpg": None}, make_exif, share=0.5)
def exif(folder):
    path = changed(folder, "photos")
    read_exif(path)
    command(match_images.main, path, "other.png", "--matching_method", "NN_ratio", "--max_keypoints", 60, "--save_path", "out")


def make_depths(folder):
    depth = np.random.default_rng(0).uniform(0.5, 5, (30, 40)).astype(np.float32)
    write_depth(folder / "depth.h5", depth)
    cv2.imwrite(str(folder / "depth.png"), (depth * 1000).astype(np.uint16))


@kind({"depth.h5": "hdf5", "depth.png": None}, make_depths)
def depth_maps(folder):
    for name in ("depth.h5", "depth.png"):
        with accepted():
            read_depth(folder / name)


def make_sequence(folder):
    (folder / "sequence").mkdir()
    for index, number in enumerate((3, 7, 11)):
        write_frame(folder / "sequence", index, number)
    np.savetxt(folder / "sequence/camera-intrinsics.txt", np.array([[90.0, 0, 46.5], [0, 92.0, 35.0], [0, 0, 1]]), fmt="%.6f")


def import_sequence(folder):
    command(import_rgbd.main, "--sequence_path", folder / "sequence", "--save_path", folder / "out", "--scene", "wall", "--eval_pairs", 2,
            "--min_rotation", 1, "--workers", 1)


@kind({"sequence/*.txt": "text", "sequence/*.png": None, "sequence/*.jpg": None}, make_sequence)
def rgbd_sequence(folder):
    import_sequence(folder)


def make_imported(folder):
    make_sequence(folder)
    import_sequence(folder)


@kind({"out/scene_info/*.npz": "npz", "out/phoenix/**/*.h5": "hdf5", "out/Undistorted_SfM/**/*.jpg": None}, make_imported, share=0.5)
def imported_sequence(folder):
    import_sequence(folder)


@kind({"old/*/0000/*.npy": "npy", "old/*/*.npy": "npy"}, lambda folder: make_old(folder / "old", ["0000"]), share=0.7)
def original_dump(folder):
    command(import_dump.main, folder / "old", folder / "out")


with contextlib.suppress(ImportError):  # pycolmap, after cv2
    from test_preprocess_megadepth import write_raw

    from dump import preprocess_megadepth

    @kind({"MegaDepth_v1_SfM/0000/sparse/manhattan/0/*.bin": None, "phoenix/**/*.h5": "hdf5"}, write_raw, share=0.5)
    def colmap(folder):
        command(preprocess_megadepth.main, "--base_path", folder, "--workers", 1)

    @kind({"MegaDepth_v1_SfM/0000/sparse/manhattan/0/*.txt": "text"}, lambda folder: write_raw(folder, text=True), share=0.5)
    def colmap_text(folder):
        command(preprocess_megadepth.main, "--base_path", folder, "--workers", 1)


# one input

@dataclass
class Failure:
    """cause: in a word or two; place: file:line of ours; text: all that is known."""

    cause: str
    place: str
    text: str


def place_of(stack) -> str:
    """The innermost frame of ours, of (file name, line) pairs from the outermost."""
    ours = [(Path(name), line) for name, line in stack if name.startswith(str(ROOT)) and "/tests/" not in name and "/.venv/" not in name]
    return f"{ours[-1][0].relative_to(ROOT)}:{ours[-1][1]}" if ours else "?"


def failure_of(error: BaseException) -> Failure:
    frames = traceback.extract_tb(error.__traceback__)
    return Failure(type(error).__name__, place_of((frame.filename, frame.lineno) for frame in frames), "".join(traceback.format_exception(error)))


@contextlib.contextmanager
def watch(found: list):
    """Note in `found` what is described at a boundary and is no error that the code foresees, and what warns."""
    describe = tools.cli.describe_error

    def describe_and_note(error):
        named = isinstance(error, OSError) and error.filename
        if not isinstance(error, InputError | OutputError) and not named:
            found.append(failure_of(error))
        return describe(error)

    def note_warning(message, category, filename, lineno, *_):
        frames = [(frame.filename, frame.lineno) for frame in traceback.extract_stack()[:-1]]
        found.append(Failure(category.__name__, place_of(frames), f"{message}\n{''.join(traceback.format_stack()[:-1])}"))

    tools.cli.describe_error = describe_and_note
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note_warning
        try:
            yield
        finally:
            tools.cli.describe_error = describe


def attempt(use, folder: Path, found: list | None = None) -> list[Failure]:
    """Let `use` read the files in `folder`, which is the working directory; what was wrong with how it ended."""
    found = [] if found is None else found
    before, said = os.getcwd(), io.StringIO()
    os.chdir(folder)
    try:
        with watch(found), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            use(folder)
    except (SystemExit, InputError, OutputError) as error:
        if isinstance(error, SystemExit) and error.code not in (0, 1, 2, None):
            found.append(failure_of(error))
    except BaseException as error:
        found.append(failure_of(error))
    finally:
        os.chdir(before)
    if "Traceback" in said.getvalue():
        found.append(Failure("traceback", "?", said.getvalue()))
    errors = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
    if any(len(line) > 1200 for line in errors):
        found.append(Failure("long message", "?", said.getvalue()))
    return found


def prepare(name: str, valid: Path, work: Path, number: int, seed: int) -> str:
    """A copy of the valid files with one of them changed; returns what was done."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(valid, work)
    rng = random.Random(f"{seed} {name} {number}")
    if number == 0:  # the valid files have to pass, too
        return "unchanged"
    pattern, form = rng.choice(list(KINDS[name].files.items()))
    path = rng.choice(sorted(work.glob(pattern)) or sorted(path for other in KINDS[name].files for path in work.glob(other)))
    return f"{path.relative_to(work)}: {mutate(path, form, rng)}"


def memory(what: str = "VmHWM") -> int:
    return int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def names_outside(home: Path) -> set[str]:
    return {path.name for path in home.iterdir()} - {"valid", "work", "log"}


def do_one(name: str, home: Path, number: int, seed: int) -> tuple[str, list[Failure]]:
    """Make input `number` in home/work and try it; what was done, and what failed."""
    done = prepare(name, home / "valid", home / "work", number, seed)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    at_start = memory()
    found = attempt(KINDS[name].use, home / "work")
    if memory() - at_start > MEMORY:
        found.append(Failure("memory", "?", f"{(memory() - at_start) / 2 ** 30:.1f} GB"))
    if not KINDS[name].names_a_place and (strays := names_outside(home)):
        found.append(Failure("written outside", "?", str(strays)))
        for stray in strays:
            (home / stray).unlink() if (home / stray).is_file() else shutil.rmtree(home / stray)
    return done, found


# many

@dataclass
class Table:
    """What came of the inputs."""

    inputs: Counter = field(default_factory=Counter)
    failed: Counter = field(default_factory=Counter)
    causes: Counter = field(default_factory=Counter)
    first: dict = field(default_factory=dict)
    seconds: Counter = field(default_factory=Counter)

    def add(self, name: str, number: int, seconds: float, failures: list[Failure]) -> None:
        self.inputs[name] += 1
        self.seconds[name] += seconds
        self.failed[name] += bool(failures)
        for failure in {(failure.cause, failure.place): failure for failure in failures}.values():
            key = failure.cause, failure.place
            self.causes[key] += 1
            self.first.setdefault(key, (name, number, failure.text))

    def text(self) -> str:
        lines = [f"{'kind':20} {'inputs':>7} {'passed':>7} {'failed':>7} {'ms each':>8}"]
        for name, n in self.inputs.items():
            lines.append(f"{name:20} {n:7} {n - self.failed[name]:7} {self.failed[name]:7} {1000 * self.seconds[name] / n:8.0f}")
        n, failed = sum(self.inputs.values()), sum(self.failed.values())
        lines.append(f"{'all':20} {n:7} {n - failed:7} {failed:7}")
        for (cause, place), n in self.causes.most_common():
            name, number, text = self.first[cause, place]
            last = (text.strip().splitlines() or [""])[-1]
            lines.append(f"{n:5} {cause:22} {place:36} {name} {number}: {last[:110]}")
        return "\n".join(lines)


def work_through(name: str, home: Path, numbers: list[int], seed: int, pipe) -> None:
    """The child: does inputs one after another, and says before each which it is."""
    log = open(home / "log", "w")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.enable(log)
    faulthandler.register(signal.SIGUSR1, log, all_threads=False)
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    tempfile.tempdir = str(home.parent)
    for number in numbers:
        pipe.send((number, None))
        pipe.send((number, do_one(name, home, number, seed)))


class Child:
    """A process that does a batch of inputs of one kind, watched from outside."""

    def __init__(self, name: str, home: Path, numbers: list[int], seed: int):
        self.name, self.home, self.numbers, self.current, self.began = name, home, list(numbers), None, time.monotonic()
        self.pipe, theirs = multiprocessing.Pipe(duplex=False)
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            self.pipe.close()
            status = 1
            try:
                work_through(name, home, numbers, seed, theirs)
                status = 0
            finally:
                os._exit(status)
        theirs.close()
        self.start_memory = self._memory()

    def _memory(self) -> int:
        with contextlib.suppress(OSError, IndexError):
            return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return 0

    def end(self, cause: str | None = None) -> tuple[str, Failure] | None:
        """Wait for the process, or end it because of `cause`; what killed it while it did an input, if something did."""
        if cause:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGUSR1)  # where it is
                time.sleep(0.3)
                os.killpg(self.pid, signal.SIGKILL)
        status = os.waitpid(self.pid, 0)[1]
        self.pipe.close()
        if self.current is None:
            return None
        log = (self.home / "log").read_text(errors="replace")
        stack = re.findall(r'File "(.+?)", line (\d+)', log)
        if cause is None:
            cause = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
        return "died", Failure(cause, place_of(reversed(stack)), log)

    def messages(self):
        """(number, seconds, (what was done, failures)) of what it finished; then, if it ended early, of what ended it."""
        over = None
        try:
            while self.pipe.poll():
                number, outcome = self.pipe.recv()
                if outcome is None:
                    self.current, self.began = number, time.monotonic()
                else:
                    self.numbers.remove(number)
                    self.current = None
                    yield number, time.monotonic() - self.began, outcome
        except EOFError:
            over = "ended"
        if over is None:
            over = ("hang" if time.monotonic() - self.began > HANG else
                    "memory" if self._memory() - self.start_memory > MEMORY else None)
        if over:
            number, seconds = self.current, time.monotonic() - self.began
            died = self.end(None if over == "ended" else over)
            self.pid = None
            if died:
                self.numbers.remove(number)
                yield number, seconds, (died[0], [died[1]])


def keep(folder: Path, name: str, home: Path, number: int, seed: int, outcome) -> None:
    """Write a failing input, made again, with what is known of it."""
    place = folder / f"{name}-{number}"
    prepare(name, home / "valid", place, number, seed)
    (place / "failure.txt").write_text(f"seed {seed}, {outcome[0]}\n" + "\n".join(failure.text for failure in outcome[1]), errors="replace")


def fuzz(names: list[str], inputs: int, seed: int = 0, workers: int = 2, kept: Path | None = None, only: int | None = None) -> Table:
    """Try about `inputs` inputs, spread over the kinds, in forked processes."""
    table, shares = Table(), sum(KINDS[name].share for name in names)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as base:
        batches = []
        for name in names:
            valid = Path(base, name, "valid")
            valid.mkdir(parents=True)
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                KINDS[name].make(valid)
            numbers = list(range(max(round(inputs * KINDS[name].share / shares), 2))) if only is None else [only]
            batches += [(name, numbers[k:k + BATCH]) for k in range(0, len(numbers), BATCH)]
        free, running = set(range(workers)), {}
        while batches or running:
            while batches and free:
                name, numbers = batches.pop(0)
                slot = free.pop()
                home = Path(base, name, str(slot))
                home.mkdir(exist_ok=True)
                if not (home / "valid").exists():
                    (home / "valid").symlink_to("../valid")
                running[slot] = Child(name, home, numbers, seed)
            multiprocessing.connection.wait([child.pipe for child in running.values()], timeout=0.1)
            for slot, child in list(running.items()):
                for number, seconds, outcome in child.messages():
                    table.add(child.name, number, seconds, outcome[1])
                    if outcome[1] and kept and all(table.causes[failure.cause, failure.place] <= 3 for failure in outcome[1]):
                        keep(kept, child.name, child.home, number, seed, outcome)
                if child.pid is None:
                    del running[slot]
                    free.add(slot)
                    if child.numbers:
                        batches.insert(0, (child.name, child.numbers))
    return table


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--inputs", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--only", type=int, metavar="NUMBER", help="just this input")
    parser.add_argument("--keep", type=Path, default=ROOT / "runs/fuzz", metavar="FOLDER", help="gets failing inputs")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    shutil.rmtree(args.keep, ignore_errors=True)
    table = fuzz(args.kind, args.inputs, args.seed, args.workers, args.keep, args.only)
    print(table.text())
    return 1 if sum(table.failed.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
