"""Kinds of files that the project reads, for tests/fuzz.py: small valid ones, and who reads them."""
import contextlib
import pickle
import random
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import cv2
import h5py
import numpy as np
import torch
import yaml
from eval_scene import list_set, make_scene, write_hdf5
from PIL import Image
from plane_scene import K, poses, texture, view
from test_import_dump import make_old
from test_import_rgbd import write_frame
from tiny_dump import make_tiny_dump

import train
from dump import dump, dump_megadepth, import_dump, import_rgbd
from eval import eval_imp, match_images
from eval.journal import Journal
from nets import SuperPoint, build_matcher
from tools import checkpoint, export_weights
from tools.cli import InputError, run
from tools.exif import read_exif
from tools.files import read_depth, read_image, write_depth, write_image, write_json
from tools.geometry import opencv_to_colmap_K
from tools.scene_info import load_scene_info, read_megadepth1500, write_scene_info
from training import curves
from training.config import load_train_config
from training.data import Choice, DumpSource, Labels, Samples
from training.start import warm_start

KINDS = {}
ROOT = Path(__file__).resolve().parent.parent


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
    status = run(main, [str(word) for word in words])
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
    return [(small(image), cv2.resize(depth, SIZE), pose) for pose in poses(n) for image,
            depth in [view(picture, pose)]]


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
    command(dump_megadepth.main, "--feature_type", "sift", "--base_path", folder, "--save_path", folder / "out",
            "--min_keypoints", 30,
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
                                      "settings": {"min_keypoints": 40, "max_keypoints": 100,
                                                   "descriptor_dtype": "float16"}})


@kind({"keypoints/*/*.npy": "record", "matches/*/*.npy": "record", "dump.json": "json", "scenes/*.json": "json"},
      make_dump)
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
    command(eval_imp.main, "--matching_method", *methods, "--feature_type", "sift", "--save_path", folder / "out",
            "--device", "cpu",
            "--max_keypoints", 100, "--pictures", 0, "--threshold", 1, *options)


@kind({"pairs.txt": "text", "depths/*.h5": "hdf5"}, make_pairs)
def pair_list(folder):
    evaluate(folder, "--pairs", folder / "pairs.txt", "--image_dir", folder / "images", "--depth_dir",
             folder / "depths")
    command(match_images.main, folder / "pairs.txt", "--image_dir", folder / "images", "--matching_method", "NN_ratio",
            "--max_keypoints", 60,
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
            file["K"], file["R"], file["T"], file["imsize"] = HALF_K, pose[:3, :3], pose[:3, 3], np.array([SIZE],
                                                                                                          np.float64)
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
        (folder / f"configs/{name}.yaml").write_text(yaml.safe_dump({"dataset": name, "output": f"out/{name}.hdf5",
                                                                     **settings, **more}))
    for name, more in (("yfcc", {"rawdata_dir": ".", "data_seq": ["square"], "data_split": ["test"]}),
                       ("scannet", {"rawdata_dir": "scannet", "pair_list": "pairs.txt"})):
        (folder / f"configs/original_{name}.yaml").write_text(yaml.safe_dump({
            "data_name": name, "dataset_dump_dir": "out", "feature_dump_dir": "out", **more, "overwrite": False,
            "extractor": {"name": "root", "num_kpt": 80, "resize": [-1], "det_th": 0.02, "overwrite": False,
                          "num_process": 1}}))


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
    checkpoint.save_checkpoint(folder / "warm.pth", {"model": network.state_dict(), "config": {"network": "imp"},
                                                     "scenes": ["sub"]})


def read_pairs(folder):
    from tools.pair_list import read_pair_list

    return read_pair_list(folder / "pairs.txt")


@kind({"features.hdf5": "hdf5"}, make_features)
def features(folder):
    evaluate(folder, "--dataset", "yfcc", "--hdf5", "features.hdf5", "--image_dir", "images", "--weights", "warm.pth",
             methods=("NN_ratio", "IMP"))


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


@kind({"config.json": "json"}, lambda folder: shutil.copyfile(ROOT / "configs/config_train_online.json",
                                                              folder / "config.json"),
      names_a_place=True)
def training_config(folder):
    with accepted():
        load_train_config(folder / "config.json", [])


def make_training(folder):
    make_dump(folder / "dump")
    write_json(folder / "config.json", {
        "layers": 2, "max_keypoints": 32, "min_inliers": 4, "max_inliers": 16, "batch_size": 2, "epochs": 2,
        "its_per_epoch": 1, "workers": 0, "gpu": [-1], "base_path": "dump", "save_path": "out", "val_pairs": 2})
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
    checkpoint.save_checkpoint(folder / "weights.pth", {"model": network.state_dict(), "step": 3, "scenes": ["0000"],
                                                        "min_loss": np.float64(3),
                                                        "config": {"network": "imp", "feature": "sift",
                                                                   "n_min_tokens": 60}})


@kind({"weights.pth": "pth"}, make_weights)
def weights(folder):
    with accepted():
        checkpoint.load_checkpoint(folder / "weights.pth")
    with accepted():
        checkpoint.load_matcher(folder / "weights.pth", "imp", 128)
    command(export_weights.main, "weights.pth", "out/small.pth")


@kind({"superpoint.pth": "pth"}, lambda folder: torch.save(SuperPoint().state_dict(), folder / "superpoint.pth"),
      share=0.5)
def superpoint(folder):
    with accepted():
        checkpoint.load_superpoint(folder / "superpoint.pth")


def make_results(folder):
    make_pairs(folder)
    (folder / "pairs.txt").write_text("a.png c.png\na.png sub/b.png\n")
    with contextlib.chdir(folder):
        match_list()


def match_list():
    command(match_images.main, "pairs.txt", "--image_dir", "images", "--matching_method", "NN_ratio",
            "--max_keypoints", 60, "--focal", 150,
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
            cv2.imwrite(str(folder / f"images/a.{suffix}"), image.astype(np.float32) / 255
                        if suffix in ("hdr", "exr", "pfm") else image)
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
    command(match_images.main, path, "other.png", "--matching_method", "NN_ratio", "--max_keypoints", 60,
            "--save_path", "out")


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
        tags.get_ifd(0x8769).update({tag: rng.choice(odd) for tag in rng.sample([0x920A, 0xA405, 0xA002, 0xA003,
                                                                                 0xA20E, 0xA210], 4)})
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
    command(match_images.main, path, "other.png", "--matching_method", "NN_ratio", "--max_keypoints", 60,
            "--save_path", "out")


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
    np.savetxt(folder / "sequence/camera-intrinsics.txt", np.array([[90.0, 0, 46.5], [0, 92.0, 35.0], [0, 0, 1]]),
               fmt="%.6f")


def import_sequence(folder):
    command(import_rgbd.main, "--sequence_path", folder / "sequence", "--save_path", folder / "out", "--scene", "wall",
            "--eval_pairs", 2,
            "--min_rotation", 1, "--workers", 1)


@kind({"sequence/*.txt": "text", "sequence/*.png": None, "sequence/*.jpg": None}, make_sequence)
def rgbd_sequence(folder):
    import_sequence(folder)


def make_imported(folder):
    make_sequence(folder)
    import_sequence(folder)


@kind({"out/scene_info/*.npz": "npz", "out/phoenix/**/*.h5": "hdf5", "out/Undistorted_SfM/**/*.jpg": None},
      make_imported, share=0.5)
def imported_sequence(folder):
    import_sequence(folder)


@kind({"old/*/0000/*.npy": "npy", "old/*/*.npy": "npy"}, lambda folder: make_old(folder / "old", ["0000"]), share=0.7)
def original_dump(folder):
    command(import_dump.main, folder / "old", folder / "out")


if find_spec("pycolmap"):
    from test_preprocess_megadepth import write_raw

    from dump import preprocess_megadepth

    @kind({"MegaDepth_v1_SfM/0000/sparse/manhattan/0/*.bin": None, "phoenix/**/*.h5": "hdf5"}, write_raw, share=0.5)
    def colmap(folder):
        command(preprocess_megadepth.main, "--base_path", folder, "--workers", 1)

    @kind({"MegaDepth_v1_SfM/0000/sparse/manhattan/0/*.txt": "text"}, lambda folder: write_raw(folder, text=True),
          share=0.5)
    def colmap_text(folder):
        command(preprocess_megadepth.main, "--base_path", folder, "--workers", 1)
