"""The training loop: build, step, validate, save, go on (SPEC 9, 10)."""
import re
import signal
import threading
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from nets import build_matcher
from tools.checkpoint import load_checkpoint, load_weights, save_checkpoint
from tools.cli import InputError
from tools.distributed import Job
from tools.features import DESCRIPTOR_DIM
from tools.files import read_lines, write_json
from training.data import DumpDataset, StepBatches, make_loader

MAX_BAD_STEPS = 10  # losses that are not finite, in one epoch
WARM_LOGIT_SCALE = 39.0  # of a perfect match; 21 * 21 / sqrt(128)
WARM_RESIDUAL = 0.02
WARM_BIN_SCORE = 30.0
# what may differ when a run goes on: where things are, how long it lasts, what it runs on
FREE_IN_RESUME = {"save_path", "resume_path", "weight_path", "gpu", "workers", "epochs", "max_minutes",
                  "keep_checkpoints", "base_path", "val_scene_list_fn", "scene_list_fn", "val_pairs"}
LOGGED = ("loss", "matching_loss_corr", "matching_loss_incorr", "acc_corr", "acc_incorr", "total_acc_corr",
          "total_acc_incorr")
LOGGED_WITH_POSE = (*LOGGED, "pose_loss", "pose_samples")


@torch.no_grad()
def warm_start(matcher) -> None:
    """Make an untrained matcher a nearest-neighbour matcher (SPEC 10), in place."""
    dim = matcher.final_proj[0].weight.shape[0]
    gain = (WARM_LOGIT_SCALE * dim ** 0.5) ** 0.5
    for proj in matcher.final_proj:
        proj.weight.copy_(gain * torch.eye(dim).unsqueeze(-1))
        proj.bias.zero_()
    for branch in [layer.mlp for layer in matcher.gnn.layers] + [matcher.kenc.encoder]:
        branch[-1].weight.mul_(WARM_RESIDUAL)
        branch[-1].bias.mul_(WARM_RESIDUAL)
    matcher.bin_score.fill_(WARM_BIN_SCORE)


def learning_rate(config: dict, step: int) -> float:
    """Rising over warmup_its steps, constant to decay_iter, then multiplied by decay_rate each step, to min_lr."""
    if step < config["warmup_its"]:
        return config["lr"] * (step + 1) / config["warmup_its"]
    return max(config["lr"] * config["decay_rate"] ** max(0, step - config["decay_iter"]), config["min_lr"])


def build(config: dict):
    """The matcher of a configuration, initialised from its seed."""
    torch.manual_seed(config["seed"])
    matcher = build_matcher(config["network"], descriptor_dim=DESCRIPTOR_DIM[config["feature"]],
                            n_layers=config["layers"], norm_fn=config["norm_fn"], ac_fn=config["ac_fn"],
                            with_sinkhorn=config["with_sinkhorn"], sinkhorn_iterations=config["sinkhorn_iterations"],
                            match_threshold=config["match_threshold"], n_min_tokens=config["n_min_tokens"])
    if config["init"] == "warm":
        warm_start(matcher)
    if config["weight_path"]:
        load_weights(matcher, load_checkpoint(config["weight_path"])["model"], config["weight_path"])
    return matcher


def make_dataset(config: dict, scene_list_fn, pairs_per_scene: int, seed: int) -> DumpDataset:
    """Samples from the scenes of a list file (None: all of the dump)."""
    scenes = read_lines(scene_list_fn) if scene_list_fn else None
    dataset = DumpDataset(config["base_path"], scenes, pairs_per_scene, config["max_keypoints"], config["min_inliers"],
                          config["max_inliers"], config["random_inliers"], seed)
    if dataset.feature_type != config["feature"]:
        raise InputError(f"{config['base_path']} holds {dataset.feature_type} features, the config says feature "
                         f"{config['feature']}")
    return dataset


class Trainer:
    """One process of a training run; `run` goes from the last checkpoint to the end."""

    def __init__(self, config: dict, job: Job):
        if config["batch_size"] % job.world_size:
            raise InputError(f"batch_size {config['batch_size']} does not divide over {job.world_size} processes")
        if config["norm_fn"] == "bn" and job.world_size > 1 and job.device.type == "cpu":
            raise InputError("norm_fn bn with several processes needs GPUs: batch statistics are not shared on the CPU")
        self.config, self.job = config, job
        self.folder = Path(config["save_path"])
        self.dataset = make_dataset(config, config["scene_list_fn"], config["pairs_per_scene"], config["seed"])
        self.val_dataset = None
        if config["val_scene_list_fn"]:
            # its own seed, fixed: the same validation samples in every run
            self.val_dataset = make_dataset(config, config["val_scene_list_fn"], config["val_pairs"], seed=10 ** 6)
            shared = set(self.val_dataset.scenes) & set(self.dataset.scenes)
            if shared:
                raise InputError(f"scene {min(shared)} is in both scene_list_fn and val_scene_list_fn")
        self.epoch_steps = config["its_per_epoch"]
        if self.epoch_steps == -1:
            self.epoch_steps = max(1, self.dataset.pairs.draw_size // config["batch_size"])

        self.model = build(config)
        if config["norm_fn"] == "bn" and job.world_size > 1:
            self.model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.model.to(job.device)
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config["optim"]]
        self.optimizer = kind(self.model.parameters(), lr=config["lr"])
        self.step, self.best, self.bad_steps = 0, None, 0
        if config["resume_path"]:
            self.resume(config["resume_path"])
        elif (self.folder / "latest.pth").exists():
            raise InputError(f"{self.folder} holds a run: give --resume_path {self.folder} to go on with it, or "
                             "another save_path")
        self.parallel = self.model
        if job.world_size > 1:
            self.parallel = DistributedDataParallel(self.model)
        self.stop = threading.Event()

    def resume(self, path) -> None:
        """Go on from a checkpoint, or from the latest of a run's folder."""
        path = Path(path) / "latest.pth" if Path(path).is_dir() else Path(path)
        content = load_checkpoint(path)
        if "optimizer" not in content:
            raise InputError(f"{path} holds weights alone, which is too little to go on from: give it as weight_path")
        for key, value in content["config"].items():
            if key not in FREE_IN_RESUME and value != self.config.get(key):
                raise InputError(f"{path} was trained with {key} {value}, now it is {self.config.get(key)}: give the "
                                 "same, or start a new run with weight_path")
        load_weights(self.model, content["model"], path)
        self.optimizer.load_state_dict(content["optimizer"])
        self.step, self.best, self.bad_steps = content["step"], content["best"], content["bad_steps"]
        if content["scenes"] != self.dataset.scenes:
            raise InputError(f"{path} was trained on {len(content['scenes'])} other scenes than base_path and "
                             f"scene_list_fn name now ({len(self.dataset.scenes)})")

    def save(self, *names: str) -> None:
        """Write the state under each name in the run's folder; keep the last few epochs' files."""
        if not self.job.is_main:
            return
        content = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step,
                   "best": self.best, "bad_steps": self.bad_steps, "config": self.config,
                   "scenes": self.dataset.scenes, "version": 1}
        for name in names:
            save_checkpoint(self.folder / f"{name}.pth", content)
        epochs = sorted(path for path in self.folder.glob("epoch_*.pth") if re.fullmatch(r"epoch_\d+", path.stem))
        for path in epochs[:-self.config["keep_checkpoints"]]:
            path.unlink()

    def run(self) -> str:
        """Train until the epochs, the minutes or the user say stop. Returns how it ended."""
        previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                previous[number] = signal.signal(number, lambda *_: self.stop.set())
        try:
            return self._run()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _run(self) -> str:
        config, job = self.config, self.job
        if job.is_main:
            write_json(self.folder / "config.json", config)
        last_step = config["epochs"] * self.epoch_steps
        deadline = time.monotonic() + 60 * config["max_minutes"] if config["max_minutes"] else float("inf")
        batches = StepBatches(self.step, last_step, config["batch_size"], job.rank, job.world_size)
        workers = -(-config["workers"] // job.world_size)
        loader = iter(make_loader(self.dataset, batches, workers, job.device.type == "cuda"))
        self.writer = SummaryWriter(self.folder / "tensorboard", purge_step=self.step + 1) if job.is_main else None
        while self.step < last_step:
            epoch = self.step // self.epoch_steps
            end = min((epoch + 1) * self.epoch_steps, last_step)
            bar = tqdm(total=self.epoch_steps, initial=self.step % self.epoch_steps, desc=f"epoch {epoch}", unit="step",
                       disable=not job.is_main)
            with bar:
                while self.step < end:
                    interrupted, late = job.any([self.stop.is_set(), time.monotonic() > deadline])
                    if interrupted or late:
                        self.save("latest")
                        return "stopped" if interrupted else "time is up"
                    self._step(next(loader), bar)
            self.bad_steps = 0
            names = ["latest", f"epoch_{epoch:05d}"]
            if self.val_dataset is not None and self._validate():
                names.append("best")
            self.save(*names)
        return "finished"

    def _step(self, batch: dict, bar) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        self.parallel.train()
        self.optimizer.zero_grad(set_to_none=True)
        config = self.config
        pose_weight = config["pose_weight"] if config["with_pose"] and self.step >= config["pose_start"] else 0.0
        batch = {key: value.to(self.job.device, non_blocking=True) for key, value in batch.items()}
        out = self.parallel(batch, pose_weight=pose_weight)
        out["loss"].backward()
        # the gradients have been averaged: a bad loss anywhere spoils them everywhere
        (bad,) = self.job.any([not bool(torch.isfinite(out["loss"]))])
        self.step += 1
        if bad:
            self.bad_steps += 1
            if self.bad_steps >= MAX_BAD_STEPS:
                raise InputError(f"the loss was not finite in {MAX_BAD_STEPS} steps of one epoch (step {self.step}): "
                                 "lower lr, or look at the data")
        else:
            self.optimizer.step()
        names = LOGGED_WITH_POSE if pose_weight > 0 else LOGGED
        values = self.job.mean(torch.stack([out[name].detach().float() for name in names]))
        if self.writer is not None:
            logged = dict(zip(names, values.tolist()))
            for name, value in logged.items():
                self.writer.add_scalar(f"train/{name}", value, self.step)
            self.writer.add_scalar("train/lr", learning_rate(self.config, self.step - 1), self.step)
            recall = logged["acc_corr"] / max(logged["total_acc_corr"], 1e-9)
            bar.set_postfix(loss=f"{logged['loss']:.3f}", recall=f"{recall:.2f}")
        bar.update()

    @torch.no_grad()
    def _validate(self) -> bool:
        """Loss, precision and recall on the validation samples; whether the loss is the best so far."""
        config, job = self.config, self.job
        self.model.eval()
        n_batches = max(1, min(config["val_pairs"], self.val_dataset.pairs.draw_size) // config["batch_size"])
        batches = StepBatches(0, n_batches, config["batch_size"], job.rank, job.world_size)
        totals = torch.zeros(4, dtype=torch.float64, device="cpu")
        for batch in make_loader(self.val_dataset, batches, 0, False):
            batch = {key: value.to(job.device) for key, value in batch.items()}
            out = self.model(batch)
            truth = batch["matching_mask"][:, :-1].max(dim=2)
            is_match = truth.indices < batch["matching_mask"].shape[2] - 1
            right = is_match & (out["matches0"] == truth.indices)
            totals += torch.tensor([out["loss"].item(), right.sum().item(), (out["matches0"] >= 0).sum().item(),
                                    is_match.sum().item()])
        loss, right, predicted, true = job.mean(totals.to(job.device, torch.float32)).tolist()
        loss /= n_batches
        precision, recall = right / max(predicted, 1e-9), right / max(true, 1e-9)
        is_best = self.best is None or loss < self.best
        if is_best:
            self.best = loss
        if self.writer is not None:
            for name, value in (("loss", loss), ("precision", precision), ("recall", recall)):
                self.writer.add_scalar(f"val/{name}", value, self.step)
            tqdm.write(f"step {self.step}: validation loss {loss:.4f}, precision {precision:.3f}, recall {recall:.3f}")
        return is_best


def train(config: dict, job: Job) -> str:
    """Train as `config` says in this process of the job; returns how it ended."""
    return Trainer(config, job).run()
