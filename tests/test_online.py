import json

import cv2
import numpy as np
import pytest
import torch
from golden.fill import fill_
from plane_scene import PLANE_Z, poses, texture, write_megadepth
from plane_scene import K as PLANE_K
from test_training_data import assert_same_batches

import train
from nets import SuperPoint
from tests.tiny_dump import make_tiny_dump
from tools import checkpoint
from tools.cli import InputError
from tools.files import write_image
from tools.geometry import lift, make_pose, project
from training import online
from training.config import DEFAULTS, load_train_config
from training.data import make_loader, step_batches
from training.sources import online_samples
from training.views import change_light, photo_camera, photo_depth, transform, turned_camera, warp

SMALL = {**DEFAULTS, "online": True, "view_size": 240, "extract_keypoints": 400, "max_keypoints": 160,
         "min_keypoints": 40, "min_inliers": 16, "max_inliers": 64}


@pytest.fixture
def photos(tmp_path):
    """A folder of six photographs, one of them upright and one in a folder below."""
    folder = tmp_path / "photos"
    for i in range(6):
        image = texture(i)[:270, :360]
        name = "below/5.png" if i == 5 else f"{i}.JPEG"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_image(folder / name, image.T.copy() if i == 4 else image)
    return folder


@pytest.fixture
def scenes(tmp_path):
    """A scene of images with depth in MegaDepth's layout."""
    write_megadepth(tmp_path / "megadepth", n=3)
    return tmp_path / "megadepth"


def samples_of(path, **options):
    return online_samples({**SMALL, "base_path": str(path), **options})


def test_a_photograph_is_a_plane(tmp_path):
    rng = np.random.default_rng(0)
    for _ in range(20):
        K, pose, H = photo_camera((500, 375), (640, 480), rng)
        corners = np.array([[-0.5, -0.5], [499.5, -0.5], [-0.5, 374.5], [499.5, 374.5], [249.5, 187]])
        seen = transform(corners, H)
        points = lift(seen, photo_depth(seen, K, pose), K, pose)
        # 640x480 of the world's units are 500x375 of the photograph's pixels, with the origin in its centre
        np.testing.assert_allclose(points, [[-320, -240, 0], [320, -240, 0], [-320, 240, 0], [320, 240, 0], [0, 0, 0]],
                                   atol=1e-6)


def test_depth_of_a_photograph_is_unknown_where_the_camera_looks_past_it():
    K, R = np.array([[100, 0, 50], [0, 100, 50], [0, 0, 1.0]]), cv2.Rodrigues(np.array([0.0, 1.2, 0]))[0]
    depth = photo_depth(np.array([[50, 50], [150, 50], [0, 50]]), K, make_pose(R, [0, 0, 5]))
    np.testing.assert_allclose(depth, [5, 5 * np.cos(1.2) / (np.cos(1.2) + np.sin(1.2)), 0])


def test_a_turned_camera_sees_what_its_image_shows():
    rng = np.random.default_rng(0)
    K = np.array([[700, 0, 310], [0, 690, 250], [0, 0, 1.0]])
    for _ in range(20):
        pixels, depth = rng.uniform(100, 400, (30, 2)), rng.uniform(2, 5, 30)
        points = lift(pixels, depth, K, np.eye(4))
        view_K, R, H = turned_camera(K, (645, 481), (320, 239), rng)
        np.testing.assert_allclose(project(points, view_K, make_pose(R, [0, 0, 0]))[0], transform(pixels, H), atol=1e-8)


@pytest.mark.parametrize("scale", [0.3, 1.4])
def test_warp_puts_pixels_where_the_homography_says(scale):
    image = np.zeros((400, 500), np.uint8)
    cv2.circle(image, (120, 150), 25, 255, -1)
    H = np.array([[scale, 0, 7], [0, scale, -3], [0, 0, 1]])
    view = warp(image, H, (400, 300), np.full((300, 400), 90, np.uint8))
    rows, columns = np.nonzero(view > 128)
    assert [columns.mean(), rows.mean()] == pytest.approx(transform(np.array([[120, 150]]), H)[0].tolist(), abs=0.1)
    inside = round(scale * 500), round(scale * 400)
    assert not (view[:inside[1] - 5, 10:inside[0]] == 90).any()
    if scale < 1:
        assert (view[inside[1] + 5:] == 90).all() and (view[:, inside[0] + 10:] == 90).all()
        mirrored = warp(image, H, (400, 300))
        assert (mirrored[:inside[1] - 5, 10:inside[0]] == view[:inside[1] - 5, 10:inside[0]]).all()
        assert not (mirrored == 90).all(axis=1).any()


def test_shrinking_does_not_alias():
    stripes = np.tile(np.array([0, 255], np.uint8), (400, 200))
    view = warp(stripes, np.diag([0.3, 0.3, 1]), (120, 120))
    assert np.ptp(view[5:-5, 5:-5].astype(int)) < 60


def test_light_changes_and_is_drawn():
    image = texture()[:120, :160]
    views = [change_light(image, np.random.default_rng(seed)) for seed in (0, 0, 1, 2, 3)]
    assert all(view.shape == image.shape and view.dtype == np.uint8 for view in views)
    assert (views[0] == views[1]).all()
    assert len({view.tobytes() for view in views}) == 4
    # it is still the same picture, where light does not vary
    for view in views:
        patches = image[:30, :30].ravel(), view[:30, :30].ravel()
        assert np.corrcoef(*patches)[0, 1] > 0.7


def test_pairs_of_a_photograph(photos):
    samples = samples_of(photos)
    (source,) = samples.sources
    assert len(source.paths) == 6
    n_matches, upright = [], set()
    for k in range(0, 24, 3):
        pair = source.pair(k, 0)
        assert pair.T_0to1 is None
        assert len(set(pair.image_paths)) == 1
        rows = [pair.matches[:, side] for side in (0, 1)]
        planes = [lift(view["keypoints"][r], view["depth"][r], view["K"], view["pose"])
                  for view, r in zip(pair.views, rows)]
        there = project(planes[0], pair.views[1]["K"], pair.views[1]["pose"])[0]
        assert np.linalg.norm(there - pair.views[1]["keypoints"][rows[1]], axis=1).max() <= 3
        assert len(set(rows[0])) == len(set(rows[1])) == len(pair.matches)
        assert all(len(np.unique(view["keypoints"], axis=0)) == len(view["keypoints"]) for view in pair.views)
        w, h = pair.views[0]["image_size"]
        upright.add(h > w)
        # nothing outside of the photograph, which is as large as the view in the world's units, has a match
        assert all((np.abs(plane[:, :2]) <= [w / 2 + 1, h / 2 + 1]).all() for plane in planes)
        assert any((view["depth"] == 0).any() for view in pair.views)
        n_matches.append(len(pair.matches))
    assert upright == {False, True}
    assert np.median(n_matches) > 40
    assert samples[3]["has_pose"] == 0


def test_pairs_of_a_scene(scenes):
    samples = samples_of(scenes)
    (source,) = samples.sources
    assert samples.scenes == ["0000"] and source.draws.size == 6
    n_matches = []
    for k in range(0, 24, 3):
        pair = source.pair(k, 0)
        assert len(set(pair.image_paths)) == 2
        assert all(view["image_size"] == (240, 180) for view in pair.views)
        for side, other in ((0, 1), (1, 0)):
            view, target = pair.views[side], pair.views[other]
            rows = pair.matches[:, side]
            points = lift(view["keypoints"][rows], view["depth"][rows], view["K"], view["pose"])
            # depth is read at a whole pixel: nearly on the plane that the images show
            np.testing.assert_allclose(points[:, 2], PLANE_Z, atol=0.03)
            there = project(points, target["K"], target["pose"])[0]
            assert np.linalg.norm(there - target["keypoints"][pair.matches[:, other]], axis=1).max() <= 3
        np.testing.assert_allclose(pair.T_0to1 @ pair.views[0]["pose"], pair.views[1]["pose"], atol=1e-9)
        n_matches.append(len(pair.matches))
    assert np.median(n_matches) > 40
    assert samples[3]["has_pose"] == 1


def test_true_matches_of_a_scene_look_alike(scenes):
    """Descriptors know nothing of depth and pose: if these were wrong, true matches would not be nearest neighbours."""
    (source,) = samples_of(scenes, inlier_th=1.0).sources
    share = []
    for k in range(0, 16, 2):
        pair = source.pair(k, 0)
        descriptors = [view["descriptors"] for view in pair.views]
        nearest = (descriptors[0] @ descriptors[1].T).argmax(axis=1)
        share.append(np.mean(nearest[pair.matches[:, 0]] == pair.matches[:, 1]))
    assert np.mean(share) > 0.5


def test_another_photograph_is_behind_each_view(photos, monkeypatch):
    for name in ("3.JPEG", "4.JPEG", "below/5.png"):
        (photos / name).unlink()
    (source,) = samples_of(photos, online_views=2).sources
    seen, warp_as_it_is = [], online.warp

    def watch(image, H, view_size, background):
        seen.append((cv2.resize(image, view_size, interpolation=cv2.INTER_AREA), background))
        return warp_as_it_is(image, H, view_size, background)

    monkeypatch.setattr(online, "warp", watch)
    for k in range(6):
        source.pair(k, 0)
        (itself, behind0), (_, behind1) = seen[-2:]
        assert not any(np.array_equal(*two) for two in ((itself, behind0), (itself, behind1), (behind0, behind1)))


def test_keypoints_in_the_mirror_image_around_a_scene_are_dropped(scenes):
    (source,) = samples_of(scenes).sources
    n_outside = 0
    for k in range(0, 24, 4):
        for view in source.pair(k, 0).views:
            image_pose = poses(3)[int(view["image_path"].split("/")[-1][0])]
            H = view["K"] @ view["pose"][:3, :3] @ image_pose[:3, :3].T @ np.linalg.inv(PLANE_K)
            assert (transform(view["keypoints"], np.linalg.inv(H)) >= 0).all()
            assert (transform(view["keypoints"], np.linalg.inv(H)) <= [319, 239]).all()
            corners = transform(np.array([[0, 0], [239, 0], [0, 179], [239, 179]]), np.linalg.inv(H))
            n_outside += not ((corners >= 0) & (corners <= [319, 239])).all()
    assert n_outside > 3  # there were such parts


def test_another_seed_makes_other_views_of_the_same_photograph(photos):
    sources = [samples_of(photos, seed=seed).sources[0] for seed in (0, 1)]
    sources[1].draws = sources[0].draws
    one, other = (source.pair(0, 0) for source in sources)
    assert one.image_paths == other.image_paths
    assert not np.array_equal(one.views[0]["K"], other.views[0]["K"])


@pytest.mark.parametrize("views", [2, 4, 6])
def test_views_are_shared_among_pairs(photos, views):
    samples = samples_of(photos, online_views=views)
    (source,) = samples.sources
    n = (views // 2) ** 2
    assert samples.draw_size == 6 * n
    pairs = [source.pair(k, 0) for k in range(2 * n)]
    for group in (pairs[:n], pairs[n:]):
        assert len({pair.image_paths for pair in group}) == 1
        assert len({id(view) for pair in group for view in pair.views}) == views
        assert len({tuple(id(view) for view in pair.views) for pair in group}) == n
        assert not {id(pair.views[0]) for pair in group} & {id(pair.views[1]) for pair in group}
    assert pairs[0].image_paths != pairs[n].image_paths


def test_same_samples_for_any_number_of_workers_and_after_a_stop(photos, scenes, tmp_path):
    dump = make_tiny_dump(tmp_path / "dump")
    config = {**SMALL, "online_sources": [{"path": str(path)} for path in (photos, scenes, dump)]}
    runs = [list(make_loader(online_samples(config), step_batches(first, 3, 6), workers, False))
            for workers, first in ((0, 0), (1, 0), (2, 0), (0, 1))]
    assert_same_batches(runs[:3])
    assert_same_batches([runs[0][1:], runs[3]])
    assert {len(name.split(": ")) for batch in runs[0] for name in batch["names"]} == {1, 2}  # dump, images
    has_pose = torch.cat([batch["has_pose"] for batch in runs[0]])
    assert 0 < has_pose.sum() < 18
    other = next(iter(make_loader(online_samples({**config, "seed": 1}), step_batches(0, 1, 6), 0, False)))
    assert not torch.equal(other["keypoints0"], runs[0][0]["keypoints0"])


def test_superpoint_finds_the_same_in_a_process_with_more_threads(photos, tmp_path, monkeypatch):
    torch.save(fill_(SuperPoint(), "random").state_dict(), tmp_path / checkpoint.SUPERPOINT)
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path)
    config = {**SMALL, "base_path": str(photos), "feature": "spp", "max_keypoints": 60, "view_size": 160}
    threads, samples = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            samples.append(online_samples(config)[0])
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    assert samples[0]["descriptors0"].shape == (60, 256)
    assert all(np.array_equal(value, samples[1][name]) for name, value in samples[0].items())


def test_images_without_enough_keypoints_are_replaced(photos):
    for name in ("0.JPEG", "1.JPEG", "2.JPEG"):
        write_image(photos / name, np.full((270, 360), 128, np.uint8))
    samples = samples_of(photos)
    taken = [samples[k] for k in range(12)]
    assert {sample["name"].split("/")[-1] for sample in taken} <= {"photos: 3.JPEG", "photos: 4.JPEG", "5.png"}
    assert not any(sample["skipped"] for sample in taken)
    assert all(np.isin(sample["target0"], range(len(sample["target1"]))).sum() >= 16 for sample in taken)
    assert "401 are needed" in samples_of(photos, min_keypoints=401)[0]["failed"]


def test_a_damaged_photograph_is_replaced_and_told(photos):
    (photos / "2.JPEG").write_bytes((photos / "2.JPEG").read_bytes()[:100])
    samples = samples_of(photos)
    skipped = [entry for k in range(24) for entry in samples[k]["skipped"]]
    assert skipped
    assert all("2.JPEG" in reason and source == str(photos) for source, reason in skipped)


@pytest.mark.parametrize("entry, message", [
    ({"path": "nowhere"}, "nowhere is not a folder"),
    ({"path": "."}, "3 are needed"),
    ({"path": "megadepth", "scene_list_fn": "list.txt"}, "has no scene 9999"),
    ({"path": "dump"}, "holds spp features"),
])
def test_sources_that_cannot_be_used_are_named(tmp_path, monkeypatch, entry, message):
    monkeypatch.chdir(tmp_path)
    write_megadepth(tmp_path / "megadepth", n=2)
    for path in (tmp_path / "megadepth").rglob("*.jpg"):
        path.rename(path.with_suffix(".txt"))
    (tmp_path / "list.txt").write_text("9999\n")
    make_tiny_dump(tmp_path / "dump", feature="spp")
    with pytest.raises(InputError, match=message):
        online_samples({**SMALL, "online_sources": [entry]})


@pytest.mark.parametrize("values, message", [
    ({"online_sources": ["photos"]}, "should be a mapping with a path"),
    ({"online_sources": [{"path": "a", "wieght": 2}]}, "a: unknown key 'wieght'; did you mean 'weight'"),
    ({"online_sources": [{"path": "a", "weight": 0}]}, "weight 0 of a should be"),
    ({"online_sources": [{"path": "a"}], "online": 0}, "online is off"),
    ({"online_views": 3}, "online_views 3: expected an even number"),
    ({"view_size": 10}, "view_size 10: expected at least 64"),
])
def test_mistakes_in_the_settings_are_named(tmp_path, values, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"online": 1, **values}))
    with pytest.raises(InputError, match=message):
        load_train_config(path, [])


def test_training_on_photographs_and_scenes(photos, scenes, tmp_path):
    config = {name: value for name, value in SMALL.items() if value != DEFAULTS[name]}
    config |= {"online_sources": [{"path": str(photos), "weight": 2}, {"path": str(scenes)}], "extract_keypoints": 150,
               "layers": 4, "batch_size": 4, "epochs": 1, "its_per_epoch": 3, "workers": 0, "gpu": [-1], "init": "warm",
               "network": "eimp", "n_min_tokens": 32, "with_pose": 1, "pose_start": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ["--config", str(tmp_path / "config.json"), "--save_path"]
    assert train.main([*arguments, str(tmp_path / "run")]) == 0
    assert "mask0" in next(iter(make_loader(online_samples({**DEFAULTS, **config}), step_batches(0, 1, 4), 0, False)))
    saved = checkpoint.load_checkpoint(tmp_path / "run" / "latest.pth")
    assert saved["scenes"] == ["0000"] and saved["step"] == 3 and not saved["bad"]
    assert all(torch.isfinite(value).all() for value in saved["model"].values())
    # stopped after two steps and gone on with, the images elsewhere
    part = [*arguments, str(tmp_path / "part")]
    train.main([*part, "--its_per_epoch", "1", "--epochs", "2"])
    photos.rename(tmp_path / "moved")
    part += ["--online_sources", json.dumps([{"path": str(tmp_path / "moved"), "weight": 2}, {"path": str(scenes)}])]
    with pytest.raises(InputError, match="was trained with its_per_epoch 1"):
        train.main([*part, "--resume_path", str(tmp_path / "part")])
    train.main([*part, "--its_per_epoch", "1", "--epochs", "3", "--resume_path", str(tmp_path / "part")])
    other = checkpoint.load_checkpoint(tmp_path / "part" / "latest.pth")["model"]
    assert all(torch.equal(value, other[name]) for name, value in saved["model"].items())
    (tmp_path / "moved" / "0.JPEG").unlink()
    with pytest.raises(InputError, match="other scenes or photographs"):
        train.main([*part, "--its_per_epoch", "1", "--epochs", "4", "--resume_path", str(tmp_path / "part")])


def test_the_true_match_threshold_is_that_of_the_settings(scenes):
    counts = [len(samples_of(scenes, inlier_th=th).sources[0].pair(1, 0).matches) for th in (1.0, 5.0)]
    assert counts[0] < counts[1]
