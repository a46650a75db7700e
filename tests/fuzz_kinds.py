"""Kinds of files that the project reads, for tests/fuzz.py: small valid ones, and who reads them."""
import contextlib
import pickle
import random
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

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
from tools.pair_list import read_pair_list, write_pair_list
from tools.scene_info import load_scene_info, read_megadepth1500, write_scene_info
from training import curves
from training.config import load_train_config
from training.data import Choice, DumpSource, Labels, Samples
from training.start import warm_start

KINDS = {}
ROOT = Path(__file__).resolve().parent.parent
HERE = Path()


class Kind(NamedTuple):
    """make(): writes valid files to the working directory. use(): reads them; results go to out. files: {glob: form},
    the forms of mutations.FORMATS or None. share: of the inputs, for those that take long."""

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


def command(main, words: str, *paths) -> None:
    """Call a command as the shell does."""
    status = run(main, [*map(str, paths), *words.split()])
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


def changed(folder) -> Path:
    """Which file of the folder is not as in the valid ones; the first if none is."""
    def content(path):
        return path.read_bytes() if path.is_file() else None

    paths = sorted(Path(folder).iterdir())
    return next((path for path in paths if not path.is_file() or content(path) != content("../valid" / path)), paths[0])


# the kinds; each `make` is called once, and is a view of the plane or a scene of the other tests, made small

def small(image, factor=2):
    return cv2.resize(image, None, fx=1 / factor, fy=1 / factor, interpolation=cv2.INTER_AREA)


HALF_K = np.diag([0.5, 0.5, 1]) @ K
SIZE = (160, 120)


def make_views(n=3) -> list:
    """(image, depth, pose) of n views of the plane, SIZE large."""
    views = [(*view(texture(), pose), pose) for pose in poses(n)]
    return [(small(image), cv2.resize(depth, SIZE), pose) for image, depth, pose in views]


def make_megadepth():
    n, points = 3, {number: [0.0, 0.0] for number in range(25)}
    images, depths = [f"img/{i}.jpg" for i in range(n)], [f"depth/{i}.h5" for i in range(n)]
    views = make_views(n)
    for name, depth_name, (image, depth, _) in zip(images, depths, views):
        write_image(name, image)
        write_depth(depth_name, depth)
    write_scene_info("scene_info/0000.0.npz", {
        "image_paths": images, "depth_paths": depths, "intrinsics": [opencv_to_colmap_K(HALF_K)] * n,
        "poses": [pose for _, _, pose in views], "n_points3D": [25] * n, "points3D_id_to_2D": [points] * n,
        "points3D_id_to_ndepth": [dict.fromkeys(points, 1.0)] * n, "overlap_matrix": np.full((n, n), 0.5),
        "scale_ratio_matrix": np.ones((n, n)), "angles": np.zeros((n, n))})


def dump_scenes():
    command(dump_megadepth.main, "--feature_type sift --base_path . --save_path out --min_keypoints 30 "
            "--max_keypoints 100 --workers 1")


@kind({"scene_info/*.npz": "npz"}, make_megadepth)
def scene_info():
    with accepted():
        load_scene_info("scene_info/0000.0.npz")
    dump_scenes()


def make_begun():
    make_megadepth()
    dump_scenes()
    Path("out/scenes/0000.json").unlink()
    for path in sorted(Path("out/matches/0000").iterdir())[2:]:
        path.unlink()


@kind({"out/*/0000/*.npy": "record", "out/dump.json": "json"}, make_begun)
def resumed_dump():
    dump_scenes()
    command(dump_megadepth.main, "--save_path out --verify")


def make_dump(folder=HERE):
    make_tiny_dump(folder, ["0000"], pairs=3, images=3, n_keypoints=40, n_matches=20)
    write_json(folder / "dump.json", {"format": "imp-dump", "version": 1, "feature_type": "sift", "settings": {
        "min_keypoints": 40, "max_keypoints": 100, "descriptor_dtype": "float16"}})


@kind({"keypoints/*/*.npy": "record", "matches/*/*.npy": "record", "dump.json": "json", "scenes/*.json": "json"},
      make_dump)
def training_dump():
    for labels in (None, Labels(3.0, 8.0)):
        with accepted():
            samples = Samples([DumpSource(HERE, labels=labels)], Choice(32, 4, 16))
            for k in range(3):
                samples[k]
    command(dump_megadepth.main, "--save_path . --verify")


def make_pairs():
    """A pair list with its images and depth maps."""
    make_scene(HERE)
    for path in HERE.rglob("*.png"):
        write_image(path, small(cv2.imread(str(path), 0)))
    for path in HERE.rglob("*.h5"):
        write_depth(path, small(read_depth(path)))
    pairs = read_pair_list("pairs.txt")[:2]
    for pair in pairs:
        pair.K0[:2] /= 2
        pair.K1[:2] /= 2
    write_pair_list("pairs.txt", pairs)


def evaluate(words: str):
    command(eval_imp.main, f"{words} --feature_type sift --save_path out --device cpu --max_keypoints 100 --pictures 0 "
            "--threshold 1")


def match(words: str, *paths):
    command(match_images.main, f"{words} --matching_method NN_ratio --max_keypoints 60 --save_path out", *paths)


@kind({"pairs.txt": "text", "depths/*.h5": "hdf5"}, make_pairs)
def pair_list():
    evaluate("--matching_method NN_ratio --pairs pairs.txt --image_dir images --depth_dir depths")
    match("pairs.txt --image_dir images")


def make_megadepth1500():
    make_megadepth()
    pairs = np.empty(2, object)
    pairs[:] = [[(0, 1), 0.5, [0.1]], [(1, 2), 0.5, [0.1]]]
    info = load_scene_info("scene_info/0000.0.npz")
    Path("lists").mkdir()
    np.savez("lists/0015_0.1_0.3.npz", pair_infos=pairs,
             **{name: info[name] for name in ("image_paths", "depth_paths", "intrinsics", "poses")})


@kind({"lists/*.npz": "npz"}, make_megadepth1500)
def megadepth1500():
    with accepted():
        read_megadepth1500("lists")
    evaluate("--matching_method NN_ratio --dataset megadepth1500 --pairs lists --image_dir .")


def make_raw():
    """Evaluation data as YFCC and as ScanNet have them."""
    test, scannet = Path("yfcc100m/square/test"), Path("scannet/scene0707_00")
    for folder in (test / "calibration", scannet / "intrinsic", scannet / "extrinsic", Path("pairs"), Path("configs")):
        folder.mkdir(parents=True)
    for i, (image, depth, pose) in enumerate(make_views()):
        write_image(test / f"images/im{i}.jpg", image)
        write_image(scannet / f"img/{15 * i}.jpg", image)
        write_depth(test / f"depths/im{i}.h5", depth)
        with h5py.File(test / f"calibration/c{i}.h5", "w") as file:
            file["K"], file["R"], file["T"], file["imsize"] = HALF_K, pose[:3, :3], pose[:3, 3], np.array([SIZE], "f8")
        np.savetxt(scannet / f"intrinsic/{15 * i}.txt", HALF_K, fmt="%.6f")
        np.savetxt(scannet / f"extrinsic/{15 * i}.txt", np.linalg.inv(pose), fmt="%.6f")
    (test / "images.txt").write_text("".join(f"images/im{i}.jpg\n" for i in range(3)))
    (test / "calibration.txt").write_text("".join(f"calibration/c{i}.h5\n" for i in range(3)))
    Path("pairs/square-te-1000-pairs.pkl").write_bytes(pickle.dumps([[0, 1], [1, 2]]))
    Path("pairs.txt").write_text("scene0707_00/img/0.jpg scene0707_00/img/15.jpg\n"
                                 "scans_test/scene0707_00/sens/frame-000015.color.jpg scene0707_00/img/30.jpg\n")
    ours = {"feature_type": "sift", "workers": 1, "extractor": {"max_keypoints": 80, "contrast_threshold": 0.02}}
    original = {"dataset_dump_dir": "out", "feature_dump_dir": "out", "overwrite": False, "extractor": {
        "name": "root", "num_kpt": 80, "resize": [-1], "det_th": 0.02, "overwrite": False, "num_process": 1}}
    for name, config in (
            ("yfcc", {"dataset": "yfcc", "raw_data_dir": ".", "scenes": ["square"], "output": "out/yfcc.hdf5", **ours}),
            ("scannet", {"dataset": "scannet", "raw_data_dir": "scannet", "pair_list": "pairs.txt",
                         "output": "out/scannet.hdf5", **ours}),
            ("original_yfcc", {"data_name": "yfcc", "rawdata_dir": ".", "data_seq": ["square"], "data_split": ["test"],
                               **original}),
            ("original_scannet", {"data_name": "scannet", "rawdata_dir": "scannet", "pair_list": "pairs.txt",
                                  **original})):
        Path(f"configs/{name}.yaml").write_text(yaml.safe_dump(config))


@kind({"pairs/*.pkl": "pkl", "yfcc100m/*/test/calibration/*.h5": "hdf5", "yfcc100m/*/test/images.txt": "text",
       "yfcc100m/*/test/calibration.txt": "text", "yfcc100m/*/test/depths/*.h5": "hdf5"}, make_raw)
def yfcc():
    command(dump.main, "--config configs/yfcc.yaml")


@kind({"pairs.txt": "text", "scannet/*/intrinsic/*.txt": "text", "scannet/*/extrinsic/*.txt": "text"}, make_raw)
def scannet():
    command(dump.main, "--config configs/scannet.yaml")
    evaluate("--matching_method NN_ratio --dataset scannet --pairs pairs.txt --image_dir scannet")


@kind({"configs/*.yaml": "yaml"}, make_raw, names_a_place=True)
def evaluation_config():
    path = changed("configs")
    with accepted():
        dump.load_config(path, ["--workers", "1"])
    with accepted():  # not all of dump.dump: a mistake may ask for much
        eval_imp.build_pair_set(eval_imp.parse_arguments(
            ["--matching_method", "NN", "--dataset", "yfcc", "--feature_type", "sift", "--config", str(path)]))


def make_parts():
    make_raw()
    command(dump.main, "--config configs/yfcc.yaml")
    Path("yfcc100m/square/test/images/im2.jpg").unlink()  # so that the parts stay
    shutil.rmtree("out")
    command(dump.main, "--config configs/yfcc.yaml")
    Path("out/yfcc.hdf5").unlink()


@kind({"out/*.parts/**/*.npy": "record", "out/*.parts/**/*.json": "json"}, make_parts)
def dump_parts():
    command(dump.main, "--config configs/yfcc.yaml")


EVALUATE_FEATURES = "--dataset yfcc --hdf5 features.hdf5 --image_dir images"


def make_features():
    make_pairs()
    write_hdf5("features.hdf5", list_set(HERE, read_pair_list("pairs.txt"), depth_dir="depths"))
    with h5py.File("features.hdf5", "r+") as file:  # fewer keypoints
        for name in ("kpt1", "kpt2", "desc1", "desc2", "depth1", "depth2"):
            for index in list(file[name]):
                values = file[name][index][:60]
                del file[name][index]
                file[name][index] = values
    torch.manual_seed(0)
    network = build_matcher("imp", descriptor_dim=128, n_layers=3)
    warm_start(network)
    checkpoint.save_checkpoint("warm.pth", {"model": network.state_dict(), "config": {"network": "imp"},
                                            "scenes": ["sub"]})


@kind({"features.hdf5": "hdf5"}, make_features)
def features():
    evaluate(f"--matching_method NN_ratio IMP --weights warm.pth {EVALUATE_FEATURES}")


def make_journal():
    make_features()
    leave = Journal.__exit__

    def keep(journal, *arguments):
        shutil.copyfile(journal.path, "kept.jsonl")
        leave(journal, *arguments)

    Journal.__exit__ = keep
    journal()
    Journal.__exit__ = leave
    lines = Path("kept.jsonl").read_text().splitlines()
    Path("out/journal.jsonl").write_text("\n".join(lines[:2]) + "\n")
    Path("kept.jsonl").unlink()


@kind({"out/journal.jsonl": "jsonl"}, make_journal)
def journal():
    evaluate(f"--matching_method NN_ratio {EVALUATE_FEATURES}")


@kind({"config.json": "json"}, lambda: shutil.copyfile(ROOT / "configs/config_train_online.json", "config.json"),
      names_a_place=True)
def training_config():
    with accepted():
        load_train_config("config.json", [])


def make_training():
    make_dump(Path("dump"))
    write_json("config.json", {
        "layers": 2, "max_keypoints": 32, "min_inliers": 4, "max_inliers": 16, "batch_size": 2, "epochs": 2,
        "its_per_epoch": 1, "workers": 0, "gpu": [-1], "base_path": "dump", "save_path": "out", "val_pairs": 2})
    command(train.main, "--config config.json --epochs 1")


@kind({"out/latest.pth": "pth", "out/best.pth": "pth", "out/*.json": "json"}, make_training, share=0.4)
def resumed_training():
    command(train.main, "--config config.json --resume_path out")


@kind({"out/events*": None, "out/*/events*": None}, make_training, share=0.3)
def training_curves():
    command(curves.main, "out --save_path out/curves.png")


@kind({"dump/*/0000/*.npy": "record", "dump/dump.json": "json"}, make_training, share=0.3)
def training():
    command(train.main, "--config config.json --save_path new")


def make_weights():
    torch.manual_seed(0)
    network = build_matcher("imp", descriptor_dim=128, n_layers=2)
    checkpoint.save_checkpoint("weights.pth", {
        "model": network.state_dict(), "step": 3, "scenes": ["0000"], "min_loss": np.float64(3),
        "config": {"network": "imp", "feature": "sift", "n_min_tokens": 60}})


@kind({"weights.pth": "pth"}, make_weights)
def weights():
    with accepted():
        checkpoint.load_checkpoint("weights.pth")
    with accepted():
        checkpoint.load_matcher("weights.pth", "imp", 128)
    command(export_weights.main, "weights.pth out/small.pth")


@kind({"superpoint.pth": "pth"}, lambda: torch.save(SuperPoint().state_dict(), "superpoint.pth"), share=0.5)
def superpoint():
    with accepted():
        checkpoint.load_superpoint("superpoint.pth")


def make_results():
    make_pairs()
    Path("pairs.txt").write_text("a.png c.png\na.png sub/b.png\n")
    results()


@kind({"out/*.npz": "npz"}, make_results)
def results():
    match("pairs.txt --image_dir images --focal 150")


def make_images():
    """One image in many formats, and photographs with EXIF data."""
    image, other = (cv2.merge([small(view(texture(), pose)[0], 3)] * 3) for pose in poses(2))
    image[:, :, 0] //= 2
    cv2.imwrite("other.png", other)
    Path("images").mkdir()
    for suffix in ("png", "jpg", "tiff", "webp", "bmp", "ppm", "pgm", "jp2", "hdr", "exr", "pfm", "gif", "ras", "avif"):
        with contextlib.suppress(cv2.error):
            floats = suffix in ("hdr", "exr", "pfm")
            cv2.imwrite(f"images/a.{suffix}", image.astype(np.float32) / 255 if floats else image)
    cv2.imwrite("images/deep.png", image.astype(np.uint16) * 257)
    cv2.imwrite("images/float.tiff", image.astype(np.float32))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif.get_ifd(0x8769).update({0x920A: 4.5, 0xA405: 28, 0xA002: 106, 0xA003: 80, 0xA20E: 8000.0, 0xA210: 2})
    Image.fromarray(image).save("images/photo.jpg", exif=exif)
    remove_empty("images")


def remove_empty(folder):
    """What an encoder gave up is no valid file."""
    for path in Path(folder).iterdir():
        if not path.stat().st_size:
            path.unlink()


@kind({"images/*": None}, make_images, share=1.5)
def images():
    path = changed("images")
    for color in (False, True):
        with accepted():
            read_image(path, color)
    match("", path, "other.png")


def make_exif():
    """Photographs with odd tags, each another one."""
    make_images()
    rng, photos = random.Random(0), Path("photos")
    odd = [0, 1, 6, 9, 2 ** 16 - 1, 1e9, 0.0, 1e-9, (1, 0), (0, 0), (-1, 1), "a", b"\0\xff", (1, 2, 3)]
    focal_tags = [0x920A, 0xA405, 0xA002, 0xA003, 0xA20E, 0xA210]
    photos.mkdir()
    for number in range(100):
        tags = Image.Exif()
        tags.get_ifd(0x8769).update({tag: rng.choice(odd) for tag in rng.sample(focal_tags, 4)})
        tags.update({tag: rng.choice(odd) for tag in rng.sample([0x0112, 0x010F, 0x011A], 2)})
        with contextlib.suppress(Exception):  # Pillow cannot write all
            Image.open("other.png").save(photos / f"{number}.jpg", exif=tags)
    remove_empty(photos)


@kind({"photos/*.jpg": None}, make_exif, share=0.5)
def exif():
    path = changed("photos")
    read_exif(path)
    match("", path, "other.png")


def make_depths():
    depth = np.random.default_rng(0).uniform(0.5, 5, (30, 40)).astype(np.float32)
    write_depth("depth.h5", depth)
    cv2.imwrite("depth.png", (depth * 1000).astype(np.uint16))


@kind({"depth.h5": "hdf5", "depth.png": None}, make_depths)
def depth_maps():
    for name in ("depth.h5", "depth.png"):
        with accepted():
            read_depth(name)


def make_sequence():
    Path("sequence").mkdir()
    for index, number in enumerate((3, 7, 11)):
        write_frame(Path("sequence"), index, number)
    np.savetxt("sequence/camera-intrinsics.txt", np.array([[90.0, 0, 46.5], [0, 92.0, 35.0], [0, 0, 1]]), fmt="%.6f")


@kind({"sequence/*.txt": "text", "sequence/*.png": None, "sequence/*.jpg": None}, make_sequence)
def rgbd_sequence():
    command(import_rgbd.main, "--sequence_path sequence --save_path out --scene wall --eval_pairs 2 --min_rotation 1 "
            "--workers 1")


def make_imported():
    make_sequence()
    rgbd_sequence()


@kind({"out/scene_info/*.npz": "npz", "out/phoenix/**/*.h5": "hdf5", "out/Undistorted_SfM/**/*.jpg": None},
      make_imported, share=0.5)
def imported_sequence():
    rgbd_sequence()


@kind({"old/*/0000/*.npy": "npy", "old/*/*.npy": "npy"}, lambda: make_old(Path("old"), ["0000"]), share=0.7)
def original_dump():
    command(import_dump.main, "old out")


if find_spec("pycolmap"):
    from test_preprocess_megadepth import write_raw

    from dump import preprocess_megadepth

    @kind({"MegaDepth_v1_SfM/0000/sparse/manhattan/0/*.bin": None, "phoenix/**/*.h5": "hdf5"}, lambda: write_raw(HERE),
          share=0.5)
    def colmap():
        command(preprocess_megadepth.main, "--base_path . --workers 1")

    @kind({"MegaDepth_v1_SfM/0000/sparse/manhattan/0/*.txt": "text"}, lambda: write_raw(HERE, text=True), share=0.5)
    def colmap_text():
        colmap()
