"""Raw MegaDepth -> undistorted images and scene_info files, which dump.dump_megadepth reads.

    python3 -m dump.preprocess_megadepth --base_path MEGADEPTH [--scene 0000 0001] [--workers 8] [--shard 0/4]

MEGADEPTH holds the two public archives, unpacked:

    phoenix/S6/zl548/MegaDepth_v1/<scene>/dense0/{imgs,depths}
    MegaDepth_v1_SfM/<scene>/{images, sparse/manhattan/0}        here, or under phoenix/S6/zl548/

and gets, scene by scene, what exists being kept:

    Undistorted_SfM/<scene>/{images,sparse,stereo}
    scene_info/<scene>.0.npz

It may be stopped at any moment, and resumes at the scene it was at. A folder Undistorted_SfM/<scene> made elsewhere,
its model in text or binary, will do instead of MegaDepth_v1_SfM/<scene>. Memory: the COLMAP model of one scene.
"""
import argparse
import contextlib
import errno
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

from dump.command import writing
from dump.workers import add_scene_shard, available_cores, deal, parse_shard, run_scenes, wait_for_all
from tools.cli import InputError, report_skipped, run, whole_number
from tools.covisibility import axis_angles, pair_matrices
from tools.extras import import_pycolmap
from tools.files import MAX_PIXELS, below, check_file, check_folder, header_size, read_image
from tools.geometry import is_camera_matrix, make_pose, project
from tools.processes import stop_on_sigterm
from tools.scene_info import MATRIX_FIELDS, OBJECT_FIELDS, write_scene_info

ARCHIVE_ROOT = "phoenix/S6/zl548"
DEPTH_ROOT = f"{ARCHIVE_ROOT}/MegaDepth_v1"
SFM_ROOTS = ("MegaDepth_v1_SfM", f"{ARCHIVE_ROOT}/MegaDepth_v1_SfM")
MODEL = Path("sparse/manhattan/0")
MIN_DEPTH_BYTES = 100 * 1024  # a smaller file is a mask of foreground and background, no depth map
FULL_DISK_BYTES = 1 << 20
PYCOLMAP_ERRORS = (ValueError, RuntimeError, IndexError, MemoryError, OSError)  # of damaged or unreadable files


def has_model(folder) -> bool:
    """Whether a folder holds a COLMAP model, in text or binary."""
    return any(all(Path(folder, f"{name}.{suffix}").is_file() for name in ("cameras", "images", "points3D"))
               for suffix in ("bin", "txt"))


def read_model(folder):
    """The pycolmap.Reconstruction in a folder, text or binary; InputError if it is damaged or has no image."""
    check_counts(folder)
    try:
        model = import_pycolmap().Reconstruction(str(folder))
        {image.name for image in model.images.values()}  # fails here if they are no text
    except PYCOLMAP_ERRORS as error:
        raise InputError(f"no readable COLMAP model in {folder}: {error}") from None
    for number, camera in model.cameras.items():
        if not (is_camera_matrix(camera.calibration_matrix()) and np.isfinite(camera.params).all()
                and camera.width * camera.height <= MAX_PIXELS):  # undistorting to such a size would not end
            raise InputError(f"the COLMAP model in {folder} is damaged: camera {number} is none")
    if not any(image.has_pose for image in model.images.values()):
        raise InputError(f"the COLMAP model in {folder} has no image with a pose")
    return model


def check_counts(folder) -> None:
    """InputError if a binary model's file counts more than it holds: pycolmap takes time and memory for any count."""
    # a record has `head` bytes, in images.bin then a name, then a number in `width` bytes, and `size` bytes each
    for name, head, width, size in (("cameras.bin", 24, 0, 0), ("images.bin", 64, 8, 24), ("points3D.bin", 43, 8, 8),
                                    ("rigs.bin", 4, 4, 8), ("frames.bin", 64, 4, 16)):
        path = Path(folder, name)
        if not path.exists():
            continue
        check_file(path, "file of a COLMAP model")
        data = path.read_bytes()
        n, place = int.from_bytes(data[:8], "little"), 8
        is_whole = n * (head + width) <= len(data)
        for _ in range(n if is_whole and size else 0):
            start = place + head if name != "images.bin" else data.find(b"\0", place + head) + 1
            counted = int.from_bytes(data[start:start + width], "little")
            place = start + width + size * (counted if name != "rigs.bin" else counted > 0)
            for _ in range(min(counted, len(data)) - 1 if name == "rigs.bin" else 0):  # sensors with a pose or without
                place += 65 if data[place + 8:place + 9] == b"\1" else 9
            if not start or place > len(data):
                is_whole = False
                break
        if not is_whole:
            raise InputError(f"no readable COLMAP model in {folder}: {name} counts more than it holds")


def usable_images(model, folder) -> tuple[list[str], list]:
    """Names of a model's images that can be used with the files in `folder`, and (name, reason) of those that cannot.

    An image of another size than its camera is named; one that is missing or damaged is in neither list.
    """
    usable, skipped = [], []
    for image in model.images.values():
        try:
            size, camera = header_size(below(folder, image.name)), (image.camera.width, image.camera.height)
            if size == camera:
                usable.append(image.name)
            elif size:
                raise InputError("the image is {}x{}, its COLMAP camera {}x{}".format(*size, *camera))
        except InputError as error:
            skipped.append((image.name, str(error)))
    return usable, skipped


def undistort(sfm, target, max_image_size: int, workers: int = 1) -> list:
    """Undistort the images and the model of `sfm`, a scene's folder of MegaDepth_v1_SfM, into the folder `target`.

    max_image_size: pixels, the larger side; workers: threads. `target` appears when it is whole. Returns (name,
    reason) of images left out because their size is not that of their camera; those missing or damaged in `sfm` are
    left out, too. InputError if the model cannot be read, or `target` cannot be written; OSError if the disk is full.
    """
    pycolmap = import_pycolmap()
    sfm, target = Path(sfm), Path(target)
    # an image of another size would end this process: pycolmap throws in a thread of its own
    usable, skipped = usable_images(read_model(sfm / MODEL), sfm / "images")
    if not usable:
        raise InputError(f"no image in {sfm}/images has the size of its COLMAP camera")
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    options, token = pycolmap.UndistortCameraOptions(), pycolmap.CancellationToken()
    options.max_image_size = max_image_size
    try:
        # in a thread, so that Ctrl-C need not wait until the scene is done
        with ThreadPoolExecutor(1) as thread:
            work = thread.submit(pycolmap.undistort_images, str(temporary), str(sfm / MODEL), str(sfm / "images"),
                                 usable, undistort_options=options, num_threads=workers, cancellation_token=token)
            try:
                work.result()
            except PYCOLMAP_ERRORS as error:
                raise InputError(f"cannot undistort {sfm}: {error}") from None
            except BaseException:
                token.cancel()
                raise
        unwritten = ["model"]  # pycolmap only logs what it could not write
        with contextlib.suppress(InputError):
            read_model(temporary / "sparse")
            unwritten = []
        for name in usable:
            with contextlib.suppress(InputError):
                if not (temporary / "images" / name).is_file() and read_image(sfm / "images" / name) is not None:
                    unwritten.append(name)
        if unwritten and shutil.disk_usage(temporary).free < FULL_DISK_BYTES:
            raise OSError(errno.ENOSPC, "")
        if unwritten:
            raise InputError(f"cannot write the undistorted {unwritten[0]} to {target.parent}: is the disk full?")
        temporary.rename(target)
        return skipped
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def observations(image, point_ids: np.ndarray, points: np.ndarray):
    """K (3, 3) in COLMAP's pixel convention and world-to-camera pose (4, 4) of an undistorted image of a model, and of
    each 3D point that lies before it the index into `points` (M,), the pixel (M, 2), and the depth (M,).

    point_ids: (P,) sorted ids of the model's points; points: (P, 3), in the world.
    """
    K = image.camera.calibration_matrix()
    cam_from_world = image.cam_from_world().matrix()
    pose = make_pose(cam_from_world[:, :3], cam_from_world[:, 3])
    observed = image.get_observation_points2D()
    ids = np.array([point.point3D_id for point in observed], dtype=np.uint64)
    if not np.isin(ids, point_ids.astype(np.uint64)).all():
        raise InputError(f"the COLMAP model is damaged: {image.name} sees points that it does not have")
    ids = ids.astype(np.int64)
    pixels = np.array([point.xy for point in observed], dtype=np.float64).reshape(-1, 2)
    ids, first = np.unique(ids, return_index=True)  # a track may visit an image twice
    indices, pixels = np.searchsorted(point_ids, ids), pixels[first]
    _, depth = project(points[indices], K, pose)
    before = depth > 0
    return K, pose, indices[before], pixels[before], depth[before]


def scene_info_from_model(model, base_path, scene: str) -> tuple[dict, list]:
    """The dict that tools.scene_info.write_scene_info takes, for the images of an undistorted model, sorted by name.

    model: pycolmap.Reconstruction. An image without an undistorted file of its camera's size, or without a depth map
    of at least MIN_DEPTH_BYTES, has None in every list and -1 in its rows and columns. Also returns (name, reason) as
    usable_images does. InputError if a camera is distorted, or if no image has depth.
    """
    images = sorted((image for image in model.images.values() if image.has_pose), key=lambda image: image.name)
    if not all(image.camera.is_undistorted() for image in images):
        raise InputError(f"the cameras of Undistorted_SfM/{scene}/sparse are distorted: delete that folder if "
                         "MegaDepth_v1_SfM is there")
    usable, skipped = usable_images(model, Path(base_path, "Undistorted_SfM", scene, "images"))
    usable, points3D = set(usable), model.points3D
    point_ids = np.array(sorted(points3D), dtype=np.int64)
    points = np.array([points3D[point_id].xyz for point_id in point_ids]).reshape(-1, 3)
    if not (np.abs(points) < 1e12).all():  # nor nan
        raise InputError("the COLMAP model is damaged: a 3D point is none")

    n = len(images)
    info = {name: [None] * n for name in OBJECT_FIELDS}
    known, seen, ndepths = [], [], []
    for i, image in enumerate(tqdm(images, f"{scene} observations", unit="image", leave=False, disable=None)):
        depth_path = f"{DEPTH_ROOT}/{scene}/dense0/depths/{PurePosixPath(image.name).stem}.h5"
        depth_file = Path(base_path, depth_path)
        if image.name not in usable or not depth_file.is_file() or depth_file.stat().st_size < MIN_DEPTH_BYTES:
            continue
        K, pose, indices, pixels, depth = observations(image, point_ids, points)
        ndepth = depth / ((K[0, 0] + K[1, 1]) / 2)
        ids = point_ids[indices].tolist()
        for name, value in (
                ("image_paths", f"Undistorted_SfM/{scene}/images/{image.name}"), ("depth_paths", depth_path),
                ("intrinsics", K), ("poses", pose), ("n_points3D", len(ids)),
                ("points3D_id_to_2D", dict(zip(ids, pixels.tolist()))),
                ("points3D_id_to_ndepth", dict(zip(ids, ndepth.tolist())))):
            info[name][i] = value
        known.append(i)
        seen.append(indices)
        ndepths.append(ndepth)
    if not known:
        raise InputError(f"no image of scene {scene} has both a file in Undistorted_SfM/{scene}/images and a depth map "
                         f"in {DEPTH_ROOT}/{scene}/dense0/depths")
    overlap, scale_ratio = pair_matrices(seen, ndepths, len(point_ids))
    angles = axis_angles([info["poses"][i] for i in known])
    for name, matrix in zip(MATRIX_FIELDS, (overlap, scale_ratio, angles)):
        info[name] = np.full((n, n), -1.0)
        info[name][np.ix_(known, known)] = matrix
    return info, skipped


def preprocess_scene(base_path, scene: str, workers: int = 1) -> list:
    """Undistort a scene and write its scene_info, unless that is done; returns (name, reason) of images left out.

    Raises InputError if a file or folder that the scene needs is missing or damaged.
    """
    info_path, target = Path(base_path, "scene_info", f"{scene}.0.npz"), Path(base_path, "Undistorted_SfM", scene)
    if info_path.is_file():
        return []
    started, skipped = time.perf_counter(), []
    if not has_model(target / "sparse"):
        candidates = [Path(base_path, parent, scene) for parent in SFM_ROOTS]
        sfm = next((path for path in candidates if path.is_dir()), candidates[0])
        if not has_model(sfm / MODEL):
            raise InputError(f"no COLMAP model in {sfm / MODEL}")
        if target.is_dir() and any(target.iterdir()):
            raise InputError(f"{target} has no COLMAP model in sparse: delete that folder")
        # as large as the depth maps are, and the images that they were made from
        dense_images = Path(base_path, DEPTH_ROOT, scene, "dense0", "imgs")
        sizes = [size for path in dense_images.glob("[!.]*") if (size := header_size(path))]
        if not sizes:
            raise InputError(f"no readable image in {dense_images}")
        skipped = undistort(sfm, target, max(map(max, sizes)), workers)
    info, unusable = scene_info_from_model(read_model(target / "sparse"), base_path, scene)
    write_scene_info(info_path, info)
    with_depth = sum(path is not None for path in info["image_paths"])
    tqdm.write(f"{scene}: {len(info['image_paths'])} images, {with_depth} with depth, in "
               f"{time.perf_counter() - started:.1f} s")
    return skipped + unusable


def preprocess_megadepth(base_path, scenes=None, workers: int = 1, shard=None) -> tuple[list, list]:
    """Preprocess the scenes (ids; all if None) under `base_path`, with `workers` threads; complete ones are left alone.

    shard: (i, n) for every n-th of the scenes from the i-th on. Returns (complete scenes, [(scene or image, reason)] of
    the unusable). Raises InputError for bad input of the whole run, InUse if another process is at a scene.
    """
    if not Path(base_path).is_dir():
        raise InputError(f"--base_path {base_path} is not a folder")
    found = sorted({path.name for parent in SFM_ROOTS + ("Undistorted_SfM",)
                    for path in Path(base_path, parent).glob("[!.]*") if path.is_dir()})
    if not found:
        raise InputError(f"no scene in MegaDepth_v1_SfM or Undistorted_SfM under {base_path}")
    unknown = [scene for scene in scenes or () if scene not in found]
    if unknown:
        raise InputError(f"no scene {', '.join(unknown[:5])} in MegaDepth_v1_SfM or Undistorted_SfM under {base_path}")
    import_pycolmap()
    for folder in ("Undistorted_SfM", "scene_info"):
        check_folder(Path(base_path, folder))
    scenes = tqdm(deal(found if scenes is None else scenes, shard), "scenes", unit="scene", disable=None)
    complete, skipped = run_scenes(
        scenes, Path(base_path, "Undistorted_SfM"), lambda scene: preprocess_scene(base_path, scene, workers),
        busy="another process is at")
    return list(complete), skipped + [(f"{scene} {name}", reason)
                                      for scene, images in complete.items() for name, reason in images]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m dump.preprocess_megadepth", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_path", required=True, help="MegaDepth's root, read and written")
    parser.add_argument("--scene", nargs="+", metavar="ID", help="just these scenes (default: all)")
    parser.add_argument("--workers", type=whole_number(1), default=available_cores(), help="threads")
    add_scene_shard(parser)
    args = parser.parse_args(argv)
    import_pycolmap()
    stop_on_sigterm()  # after the import, which takes the signal for itself
    with writing(f"to {args.base_path}"):
        complete, skipped = preprocess_megadepth(args.base_path, args.scene, args.workers, parse_shard(args.shard))
    print(f"{len(complete)} scenes complete")
    status = report_skipped(skipped, "scenes or images" if any(" " in name for name, _ in skipped) else "scenes")
    wait_for_all("the end")
    return status if complete or not skipped else 2


if __name__ == "__main__":
    sys.exit(run(main))
