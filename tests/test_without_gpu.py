"""What a GPU would say of the code, without one: which tensors are where, and when the host waits for the device."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.fill import fill_

from eval import peers
from eval.iterative import match_iteratively
from nets import SuperPoint
from nets.layers import Attention
from tests.fake_gpu import DEVICE, N, fake_gpu, make_batch, make_matcher
from tests.tiny_dump import make_tiny_dump
from tools import checkpoint, distributed, pretrained
from tools.distributed import Job
from tools.features import build_extractor
from training import trainer
from training.config import DEFAULTS
from training.sources import training_samples
from training.trainer import Trainer, build
from training.validation import to_device, validate

REPOSITORY = Path(__file__).parent.parent
SMALL = {"layers": 5, "sinkhorn_iterations": 3, "n_min_tokens": 16, "max_keypoints": 48, "min_inliers": 8,
         "max_inliers": 24, "batch_size": 2, "epochs": 1, "its_per_epoch": 2, "workers": 0}


@pytest.mark.parametrize("kind, norm_fn, masks, waits", [
    ("gm", "in", False, []), ("imp", "in", True, []), ("eimp", "in", True, []), ("eimp", "bn", False, []),
    # statistics are of real keypoints: 4 norms of the encoder take both views, 10 layers of IMP them together
    ("imp", "bn", True, ["boolean index"] * (4 * 2 + 10))])
def test_a_training_step_does_not_wait(kind, norm_fn, masks, waits):
    with fake_gpu() as gpu:
        matcher = make_matcher(kind, norm_fn).to(DEVICE).train()
        batch = make_batch(masks, DEVICE)
        gpu.waits.clear()
        loss = matcher(batch, pose_weight=1.0)["loss"]
        assert gpu.waits == waits
        loss.backward()
        assert all(parameter.grad.device == DEVICE for parameter in matcher.parameters())
        torch.optim.Adam(matcher.parameters()).step()
    assert gpu.waits == waits


def test_forward_in_training_mode_on_cuda_tensors():
    """In float32 and under CUDA's own autocast; in a process of its own, which has to pretend more than is healthy."""
    done = subprocess.run([sys.executable, "-m", "tests.fake_gpu"], cwd=REPOSITORY, capture_output=True, text=True,
                          timeout=240)
    expected = [f"{kind}: projection {precision}, Sinkhorn {{torch.float32}}, loss torch.float32 cuda:0"
                for kind in ("gm", "imp", "eimp") for precision in ("torch.float32", "torch.bfloat16")]
    assert done.stdout.splitlines() == expected, done.stderr


@pytest.mark.parametrize("kind", ["imp", "eimp"])
def test_attention_is_stored_on_a_cpu_alone_and_the_same_without(kind, monkeypatch):
    with fake_gpu():
        *_, state = make_matcher(kind).to(DEVICE).iterate(make_batch(True, DEVICE), 3)
        assert state.attention_self[0].is_shared and state.attention_self[0].stored is None
    results = []
    for most in (Attention.MAX_STORED, 0):
        monkeypatch.setattr(Attention, "MAX_STORED", most)
        matcher = fill_(make_matcher(kind).double(), "", 3.0).train()
        batch = {name: value.double() if value.is_floating_point() else value
                 for name, value in make_batch(True, "cpu").items()}
        *_, state = matcher.iterate(batch, 3)
        assert (state.attention_self[0].stored is not None) == bool(most)
        loss = matcher(batch)["loss"]
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in matcher.parameters())])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other)


READ = ["to cpu"] * 4  # matches, scores, and which keypoints they are of


def test_the_loop_waits_where_it_reads_and_removes():
    def estimate(matches, scores=None, quick=False):
        return np.eye(3), np.array([1.0, 0, 0]), np.ones(len(matches), bool)

    with fake_gpu(1) as gpu:
        matcher = make_matcher("eimp", n_layers=7).to(DEVICE).eval()
        data = {name: value[:1] for name, value in make_batch(False, DEVICE).items() if name[-1] in "01"}
        gpu.waits.clear()
        found = match_iteratively(matcher, data, estimate)
    assert found.stopped_early and found.n_iterations == 6
    assert gpu.waits == READ + ["nonzero"] * 2 + READ


@pytest.mark.parametrize("kind, layer_updates", [("gm", 2), ("imp", 1), ("eimp", 2)])
def test_batch_norms_shared_by_processes_take_the_same_statistics(kind, layer_updates):
    """Of each view by itself in the encoder and in layers, but for IMP's, which take both views at once."""
    results = []
    for convert in (lambda matcher: matcher, torch.nn.SyncBatchNorm.convert_sync_batchnorm):
        matcher = convert(fill_(make_matcher(kind, "bn"), "", 3.0)).train()
        loss = matcher(make_batch(True, "cpu"))["loss"]
        loss.backward()
        results.append([loss.detach(), *matcher.buffers(), *(parameter.grad for parameter in matcher.parameters())])
    assert isinstance(matcher.kenc.encoder[1], torch.nn.SyncBatchNorm)
    assert matcher.kenc.encoder[1].num_batches_tracked == 2
    assert {int(layer.mlp[1].num_batches_tracked) for layer in matcher.gnn.layers} == {layer_updates}
    assert all(torch.equal(one, other) for one, other in zip(*results))


def load_nothing(name, path, device, build, *_):
    return build().eval().to(device)


def test_lightglue_in_the_loop(monkeypatch):
    pytest.importorskip("kornia")
    monkeypatch.setattr(peers, "load_pretrained", load_nothing)
    with fake_gpu(1) as gpu, torch.no_grad():
        matcher = peers.LightGlue("aliked", None, DEVICE)
        data = {"descriptors0": torch.rand(1, N, 128), "keypoints0": 100 * torch.rand(1, N, 2),
                "image_size0": torch.tensor([[100.0, 100.0]])}
        data = {name[:-1] + v: value.to(DEVICE) for name, value in data.items() for v in "01"}
        gpu.waits.clear()
        for state in matcher.iterate(data, 2):
            confident = state.is_confident()
            state.matches(0.1)
    asks, filters = ["item"], ["boolean index"] * 2  # kornia's, of matches
    prunes = ["item", "nonzero"] * 2  # whether any keypoint of a view is kept, and which
    assert confident and gpu.waits == asks + filters + prunes + asks + filters


@pytest.mark.parametrize("feature_type, waits", [
    ("spp", ["nonzero", "boolean index", "boolean index"]), ("aliked", None), ("disk", None)])
def test_extractors(feature_type, waits, monkeypatch):
    """waits: of each image's detection; None where the network is not ours."""
    if feature_type != "spp":
        pytest.importorskip("kornia")
    monkeypatch.setattr(distributed, "choose_device", lambda name: DEVICE)
    monkeypatch.setattr(pretrained, "load_pretrained", load_nothing)
    monkeypatch.setattr(checkpoint, "load_superpoint", lambda _, device, **settings: SuperPoint(**settings).to(device))
    with fake_gpu() as gpu:
        extractor = build_extractor(feature_type, max_keypoints=20)
        gpu.waits.clear()
        found = extractor.extract_batch([np.zeros((64, 96, 3)[:3 if extractor.color else 2], np.uint8)] * 2)
    assert [one.descriptors.shape[1] for one in found] == [extractor.dim] * 2
    if waits:
        assert gpu.waits == ["to gpu"] + waits * 2 + ["to cpu"] * 6


@pytest.fixture
def config(tmp_path):
    make_tiny_dump(tmp_path / "dump")
    return {**DEFAULTS, **SMALL, "base_path": str(tmp_path / "dump"), "save_path": str(tmp_path / "run")}


def test_training_waits_once_a_step(config, monkeypatch):
    step, waits = Trainer._step, []

    def record(trainer, batch):
        gpu.waits.clear()
        following = step(trainer, batch)
        waits.append(gpu.waits[:])
        return following

    monkeypatch.setattr(Trainer, "_step", record)
    monkeypatch.setattr(Trainer, "save", lambda *_: None)  # fake tensors have no content
    with fake_gpu() as gpu:
        trainer = Trainer({**config, "with_pose": True, "pose_start": 0, "clip_grad": 1.0}, Job(0, 1, DEVICE))
        assert trainer.run() == "finished"
    assert waits == [["to cpu"]] * 2


@pytest.mark.filterwarnings("ignore:'pin_memory'")
def test_the_optimiser_is_fused_by_the_device_alone(config, monkeypatch):
    """A run that moves from the CPU to a GPU and back; the tensors of this one stay on the CPU."""
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, device: module)
    monkeypatch.setattr(trainer, "to_device", lambda batch, device: to_device(batch, torch.device("cpu")))
    for epochs, device, fused in ((1, "cpu", False), (2, "cuda", True), (3, "cpu", False)):
        run = Trainer({**config, "epochs": epochs, "resume_path": config["save_path"]}, Job(0, 1, torch.device(device)))
        assert [group["fused"] for group in run.optimizer.param_groups] == [fused]
        assert run.run() == "finished" and run.step == 2 * epochs


@pytest.mark.parametrize("gpu, expected", [([], ["cuda:0", "cuda:1"]), ([1], ["cuda:1"]), ([-1], ["cpu"])])
def test_devices_where_there_are_two_gpus(gpu, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(device) for device in distributed.choose_devices(gpu)] == expected


@pytest.mark.parametrize("device, backend, current", [("cpu", "gloo", []), ("cuda:1", "nccl", ["cuda:1"])])
def test_processes_meet_by_what_their_devices_speak(device, backend, current, monkeypatch):
    calls, chosen = [], []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))
    monkeypatch.setattr(distributed, "_meeting_point", lambda rank, world_size: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.setattr(torch.distributed, "barrier", lambda: calls.append("barrier"))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: calls.append("destroy"))
    assert distributed._join(lambda job: str(job.device), 1, 2, torch.device(device), ()) == device
    assert chosen == current
    # no device_id: with it NCCL would set itself up at once
    assert calls == [((backend,), {"store": None, "rank": 1, "world_size": 2}), "barrier", "destroy"]


def test_validation_waits_for_matches_and_once(config):
    samples = training_samples(config)
    with fake_gpu() as gpu:
        matcher = build(config).to(DEVICE).eval()
        gpu.waits.clear()
        numbers, _ = validate(matcher, samples, Job(0, 1, DEVICE), 6, 2, with_pose=True)
    assert gpu.waits == ["to cpu"] * (3 + 1) and {"loss", "auc5"} <= numbers.keys()
