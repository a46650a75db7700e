"""Raw evaluation data: the pairs, images and cameras of YFCC as OANet packs it and of ScanNet as SGMNet does."""
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from tools.cli import InputError
from tools.files import below, hdf5_array, open_hdf5, read_lines
from tools.geometry import make_pose
from tools.pair_list import read_pair_list
from tools.safe_pickle import load_pickle, numbers
from tools.scannet import beside, packed_name, read_scannet_camera, usable_camera


@dataclass(frozen=True)
class View:
    """One image and what belongs to it; paths relative to raw_data_dir."""

    image_path: str
    calibration_path: str = ""  # yfcc
    depth_paths: tuple[str, ...] = ()  # where a depth map may be

    def check_name(self) -> None:
        """InputError if what a list calls the image cannot be one."""
        if not self.depth_paths:
            raise InputError(f"{self.image_path} is neither <scene>/img/<N>.jpg nor <scene>/sens/frame-<N>.color.jpg")
        below(".", self.image_path)


def list_pairs(config: dict) -> list[tuple[View, View]]:
    """The pairs of views of a configuration of dump.dump, in order; InputError if the lists cannot be read."""
    raw_data_dir, scenes = Path(config["raw_data_dir"]), config["scenes"]
    if config["dataset"] == "scannet":  # cameras come from the raw data, also if the pair list has some
        return [(_scannet_view(pair.image0), _scannet_view(pair.image1))
                for pair in read_pair_list(config["pair_list"])]
    if not scenes:
        scenes = sorted(path.parent.name for path in (raw_data_dir / "yfcc100m").glob("*/test"))
        if not scenes:
            raise InputError(f"{raw_data_dir / 'yfcc100m'} holds no <scene>/test")
    return [pair for scene in scenes for pair in _yfcc_pairs(raw_data_dir, scene)]


def _scannet_view(name: str) -> View:
    name = packed_name(name)
    path = PurePosixPath(name)
    is_packed = len(path.parts) >= 3 and path.parent.name == "img"
    return View(name, depth_paths=tuple(beside(name, "depth", suffix) for suffix in (".png", ".h5") if is_packed))


def _yfcc_pairs(raw_data_dir: Path, scene: str) -> list[tuple[View, View]]:
    root = PurePosixPath("yfcc100m", scene, "test")
    images, cameras = (read_lines(raw_data_dir / root / name) for name in ("images.txt", "calibration.txt"))
    if len(images) != len(cameras):
        raise InputError(f"{raw_data_dir / root}: images.txt names {len(images)} files, calibration.txt "
                         f"{len(cameras)}; they must go together line by line")
    lists = sorted((raw_data_dir / "pairs").glob(f"{scene}-te-*-pairs.pkl"))
    if not lists:
        raise InputError(f"no {scene}-te-1000-pairs.pkl in {raw_data_dir / 'pairs'}")
    path = next((path for path in lists if path.name == f"{scene}-te-1000-pairs.pkl"), lists[0])
    content = load_pickle(path)
    try:
        pairs = numbers(content, None, 2)
        if (pairs != np.trunc(pairs)).any():
            raise InputError("they are not whole")
    except InputError as error:
        raise InputError(f"{path} is not a list of pairs of image numbers: {error}") from None
    for number in pairs[(pairs < 0) | (pairs >= len(images))][:1]:
        raise InputError(f"{path} names image {number:g} of {len(images)}")
    views = [View(str(root / image), str(root / camera), (str(root / "depths" / f"{PurePosixPath(image).stem}.h5"),))
             for image, camera in zip(images, cameras)]
    return [(views[i], views[j]) for i, j in pairs.astype(int)]


def read_camera(dataset: str, raw_data_dir, view: View, image_size: tuple[int, int]):
    """(K (3, 3) in OpenCV's convention, pose (4, 4) world-to-camera) of a view; InputError if they cannot be used."""
    if dataset == "scannet":
        return read_scannet_camera(raw_data_dir, view.image_path)
    path = below(raw_data_dir, view.calibration_path)
    try:
        with open_hdf5(path) as file:
            K, R, T, imsize = (hdf5_array(file, name).astype(np.float64) for name in ("K", "R", "T", "imsize"))
            K, pose = K.reshape(3, 3), make_pose(R.reshape(3, 3), T.reshape(3))
            w, h = np.ravel(imsize)
    except InputError as error:
        raise InputError(f"not a calibration file: {path} ({error})") from None
    if (w, h) != image_size:
        raise InputError(f"{path} is for an image of {w:g}x{h:g}, it is {image_size[0]}x{image_size[1]}")
    K[:2, 2] = (w - 1) / 2, (h - 1) / 2
    return usable_camera(K, pose, view.calibration_path)
