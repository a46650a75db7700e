"""Offline step: MegaDepth, or anything in its layout, -> keypoint and match records to train on.

    python3 -m dump.dump_megadepth --feature_type sift --base_path MEGADEPTH --save_path OUT [--workers 8] [--shard 0/4]

Scene by scene: features of every image that has a candidate pair (dump/keypoints.py), then the correspondences of the
pairs (dump/matches.py). It may be stopped at any moment, and resumes with a result identical to the byte: a record
appears whole or not at all, pairs are tried in a fixed order, and a scene is complete when OUT/scenes/<scene>.json is
there. `tools/manifest.py` describes the folder and reads it.

Whoever writes a scene holds its lock. The bytes of networks' features are those of one model of processor, or GPU:
others round otherwise. docs/megadepth.md: several machines, time and memory.
"""
import argparse
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

from dump.command import add_common_options, finish_report, report_verified, writing
from dump.features import extract_missing, extractor
from dump.keypoints import ImageTask, Recipe
from dump.matches import MIN_WITH_DEPTH, match_numbers, read_view, write_matches
from dump.verify import verify_dump
from dump.workers import add_scene_shard, available_cores, deal, parse_shard, run_scenes, wait_for_all
from tools.cli import InputError, report_skipped, run
from tools.features import FEATURE_TYPES
from tools.files import read_lines, write_json
from tools.manifest import claim, keypoint_path, match_path, read_scene, scene_path
from tools.processes import peak_memory_mb, stop_on_sigterm, worker_pool
from tools.records import KEYPOINT_FIELDS
from tools.scene_info import candidate_pairs, list_scenes, load_scene_info


def dump_megadepth(base_path, save_path, recipe: Recipe, scenes=None, workers: int = 1, shard=None) -> dict:
    """Dump the scenes (ids; all if None) of `base_path` into `save_path`; complete ones are only read.

    shard: (i, n) for every n-th of the scenes from the i-th on. Returns {"scenes": {scene: counts as from dump_scene},
    "skipped": [(scene or image, reason)], "work": as in dump_scene}. Raises InputError for bad input of the whole run,
    InUse if another process writes one of the scenes.
    """
    if not Path(base_path).is_dir():
        raise InputError(f"--base_path {base_path} is not a folder")
    files = list_scenes(base_path, scenes)
    extractor(*recipe.extraction)  # bad settings must stop here, not in each scene
    claim(save_path, recipe.manifest())
    work = Counter()
    with worker_pool(workers) as pool:
        results, failed = run_scenes(deal(files, shard), save_path, lambda scene: (
            _finished(save_path, scene)
            or dump_scene(scene, files[scene], base_path, save_path, recipe, pool, workers, work)))
    skipped = [(f"scene {scene}", problem) for scene, problem in failed]
    skipped += [(f"{scene} {name}", problem) for scene in results for name, problem in results[scene]["skipped"]]
    return {"scenes": results, "skipped": skipped, "work": work}


def _finished(save_path, scene) -> dict | None:
    """The counts of a scene that was finished, and of which no record has been deleted since."""
    if not scene_path(save_path, scene).is_file():
        return None
    counts = read_scene(save_path, scene)
    n_images = len(list((Path(save_path) / "keypoints" / scene).glob("[!.]*.npy")))
    is_whole = n_images >= counts["images"] and len(match_numbers(save_path, scene)) >= counts["pairs"]
    return counts if is_whole else None


def dump_scene(scene: str, info_path, base_path, save_path, recipe: Recipe, pool=None, workers: int = 1,
               work: Counter | None = None) -> dict:
    """Dump one scene, resuming from what is there; return its counts, which are also OUT/scenes/<scene>.json.

    info_path: its scene_info file. pool: from worker_pool(workers). work: images and pairs of this run, not those
    found done, and image_seconds and pair_seconds that they took, are added to it. docs/formats.md lists the counts.
    Raises InputError if the scene_info, or a record made before, cannot be used.
    """
    info = load_scene_info(info_path)
    pairs = candidate_pairs(info)
    overlap, skipped = np.float64(info["overlap_matrix"][tuple(pairs.T)]), info.get("left_out", [])
    tasks = {i: ImageTask(
        str(base_path), info["image_paths"][i], info["depth_paths"][i], info["intrinsics"][i], info["poses"][i],
        keypoint_path(save_path, scene, info["image_paths"][i], recipe.feature_type), recipe)
        for i in np.unique(pairs).tolist()}
    if len({task.record_path for task in tasks.values()}) < len(tasks):
        raise InputError(f"{info_path}: two images have the same file name, and would share a keypoint record")
    del info  # its points are most of the memory

    started = time.perf_counter()
    outcomes, n_missing = extract_missing(list(tasks.values()), recipe.extraction, KEYPOINT_FIELDS, pool, workers,
                                          title=f"{scene} images")
    matching_started = time.perf_counter()
    seconds = matching_started - started
    print(f"{scene}: {n_missing} images in {seconds:.1f} s", end="", flush=True)

    outcomes = {i: outcomes[task.record_path] for i, task in tasks.items()}  # True, False or a reason
    kept = [i for i, outcome in outcomes.items() if outcome is True]
    is_usable = np.isin(pairs, kept).all(axis=1)
    usable = pairs[is_usable]
    n_valid, n_tried = write_matches(save_path, scene, usable, overlap[is_usable], tasks, pool, workers)
    pair_seconds = time.perf_counter() - matching_started
    print(f", {n_tried} pairs in {pair_seconds:.1f} s, {n_valid} valid")
    if work is not None:
        work.update(images=n_missing, image_seconds=seconds, pairs=n_tried, pair_seconds=pair_seconds)

    # from here on all follows from the data and the files, so that an interrupted run ends with the same
    without_depth = [i for i in kept if read_view(tasks[i].record_path)[1] <= MIN_WITH_DEPTH]
    few_with_depth = int(np.isin(usable, without_depth).any(axis=1).sum())
    keypoint_bytes = sum(tasks[i].record_path.stat().st_size for i in kept)
    counts = {
        "pairs": n_valid, "images": len(kept), "candidate_pairs": len(pairs), "candidate_images": len(tasks),
        "few_keypoints": sum(outcome is False for outcome in outcomes.values()),
        "rejected": {"image_left_out": len(pairs) - len(usable), "few_keypoints_with_depth": few_with_depth,
                     "few_matches": len(usable) - few_with_depth - n_valid},
        "skipped": skipped + [[tasks[i].image_path, outcome] for i, outcome in outcomes.items()
                              if isinstance(outcome, str)],
        "bytes": keypoint_bytes + sum(match_path(save_path, scene, k).stat().st_size for k in range(n_valid)),
        "keypoint_bytes": keypoint_bytes,
    }
    # what a killed run left half-written: now, when a worker that outlived its parent by a moment has ended too
    for pattern in (f"keypoints/{scene}/.*.tmp.npy", f"matches/{scene}/.*.tmp.npy", f"scenes/.{scene}.*.tmp.json"):
        for stray in Path(save_path).glob(pattern):
            stray.unlink()
    write_json(scene_path(save_path, scene), counts)
    return counts


def make_report(summary: dict, seconds: float, workers: int) -> dict:
    """Print, and return for --report, what became of the images and pairs of a dump_megadepth summary.

    images, pairs: kept; pairs_tried: those with enough overlap; rates are of this run, None if it did nothing;
    megabytes_per_image: of keypoint records; peak_memory_mb: see tools.processes.peak_memory_mb.
    """
    scenes, work, total, rejected = summary["scenes"], summary["work"], Counter(), Counter()
    for counts in scenes.values():
        total.update({name: n for name, n in counts.items() if isinstance(n, int)})
        rejected.update(counts["rejected"])
    print(f"{len(scenes)} scenes, {total['images']} of {total['candidate_images']} images, {total['pairs']} of "
          f"{total['candidate_pairs']} pairs, {total['bytes'] / 1e6:.1f} MB, {seconds:.1f} s")
    if total["few_keypoints"]:
        print(f"{total['few_keypoints']} images have fewer keypoints than --min_keypoints")
    for reason, n in rejected.items():
        print(f"pairs rejected, {reason.replace('_', ' ')}: {n}")
    if empty := [scene for scene, counts in scenes.items() if not counts["pairs"]]:
        print(f"{len(empty)} scenes have no valid pair: {', '.join(empty)}")
    return {
        "images": total["images"], "pairs_tried": total["candidate_pairs"], "pairs": total["pairs"],
        "rejected": dict(rejected), "skipped": summary["skipped"], "seconds": seconds,
        "images_per_second": work["images"] / work["image_seconds"] if work["images"] else None,
        "pairs_per_second": work["pairs"] / work["pair_seconds"] if work["pairs"] else None,
        "megabytes_per_image": total["keypoint_bytes"] / total["images"] / 1e6 if total["images"] else None,
        "peak_memory_mb": peak_memory_mb(workers),
    }


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="dump.dump_megadepth", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Features and correspondences of scenes in MegaDepth's layout. Run it again to resume.")
    parser.add_argument("--feature_type", choices=list(FEATURE_TYPES))
    parser.add_argument("--base_path", help="folder that holds scene_info/")
    parser.add_argument("--save_path", required=True, help="folder of the dump; one feature type each")
    parser.add_argument("--scene_list", help="file of scene ids, one a line; default: all")
    parser.add_argument("--min_keypoints", type=int, default=1024, help="images with fewer are left out")
    settings = [
        parser.add_argument("--max_keypoints", type=int, default=argparse.SUPPRESS, help="strongest kept (4096)"),
        parser.add_argument("--contrast_threshold", type=float, default=argparse.SUPPRESS, help="of sift (0.04)"),
        parser.add_argument("--unique_locations", action="store_true", default=argparse.SUPPRESS,
                            help="sift: one keypoint per place"),
        parser.add_argument("--no_align_corners", dest="align_corners", action="store_false", default=argparse.SUPPRESS,
                            help="spp: sample descriptors as published, under torch 1.10-1.13")]
    parser.add_argument("--descriptor_dtype", choices=["float16", "float32"], default="float16")
    parser.add_argument("--workers", type=int, default=available_cores(), help="processes")
    add_scene_shard(parser)
    add_common_options(parser)
    args = parser.parse_args(argv)
    scenes = read_lines(args.scene_list) if args.scene_list else None
    if args.verify:
        status = report_verified(*verify_dump(args.save_path, scenes), "records")
        if status:
            print("delete the files named here and run the dump again: it makes them again", file=sys.stderr)
        return status
    if not args.feature_type or not args.base_path:
        parser.error("--feature_type and --base_path are needed")

    stop_on_sigterm()
    recipe = Recipe(args.feature_type, args.min_keypoints, args.descriptor_dtype, args.device, **{
        action.dest: getattr(args, action.dest) for action in settings if action.dest in args})
    started, shard = time.perf_counter(), parse_shard(args.shard)
    with writing(f"to {args.save_path}"):
        summary = dump_megadepth(args.base_path, args.save_path, recipe, scenes, args.workers, shard)
    if shard:
        print(f"shard {shard[0]}/{shard[1]}:")
    finish_report(args.report, make_report(summary, time.perf_counter() - started, args.workers))
    status = report_skipped(summary["skipped"], "images or scenes")
    wait_for_all("the end")
    return status if summary["scenes"] or not summary["skipped"] else 2


if __name__ == "__main__":
    sys.exit(run(main))
