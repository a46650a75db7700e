"""The training loop: build, step, validate, save, resume."""
import contextlib
import itertools
import math
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from nets import build_matcher
from tools.checkpoint import load_checkpoint, load_weights, save_checkpoint
from tools.cli import InputError
from tools.distributed import Job
from tools.features import FEATURE_TYPES
from tools.files import check_folder, remove_strays, write_json
from tools.locks import locked
from tools.precision import autocast, check_precision, tf32
from training.data import end_workers, make_loader, step_batches
from training.monitor import Monitor
from training.sources import training_samples, validation_samples
from training.start import branch_ends, published_start, warm_start
from training.state import load_optimizer, optimizer_state, read_state
from training.validation import match_pictures, to_device, validate

MAX_BAD_STEPS = 10  # losses that are not finite, in one epoch
NAMED_PAIRS = 5  # in the message that ends such a run
# what may differ when a run is resumed: where things are, how long it lasts, what it runs on, what is watched
FREE_IN_RESUME = {"save_path", "resume_path", "weight_path", "gpu", "workers", "epochs", "max_minutes",
                  "keep_checkpoints", "base_path", "val_path", "val_scene_list_fn", "scene_list_fn", "val_pairs",
                  "val_images", "do_eval", "eval_epochs", "precision", "compile", "deterministic"}
MATCHER_SETTINGS = ("norm_fn", "ac_fn", "with_sinkhorn", "sinkhorn_iterations", "match_threshold", "n_min_tokens")


def parameter_groups(matcher, branch_lr: float) -> list[dict]:
    """What an optimiser takes: the last layers of residual branches and of the encoder learn at branch_lr times lr."""
    last = {id(parameter): parameter for end in branch_ends(matcher) for parameter in end.parameters()}
    return [{"params": [parameter for parameter in matcher.parameters() if id(parameter) not in last], "share": 1.0},
            {"params": list(last.values()), "share": branch_lr}]


def learning_rate(config: dict, step: int) -> float:
    """Rising over warmup_its steps, constant to decay_iter, then multiplied by decay_rate each step, to min_lr."""
    if step < config["warmup_its"]:
        return config["lr"] * (step + 1) / config["warmup_its"]
    return max(config["lr"] * config["decay_rate"] ** max(0, step - config["decay_iter"]), config["min_lr"])


def build(config: dict):
    """The matcher of a configuration, initialised from its seed."""
    torch.manual_seed(config["seed"])
    matcher = build_matcher(config["network"], descriptor_dim=FEATURE_TYPES[config["feature"]].dim,
                            n_layers=config["layers"], **{key: config[key] for key in MATCHER_SETTINGS})
    if config["weight_path"]:
        load_weights(matcher, load_checkpoint(config["weight_path"])["model"], config["weight_path"])
    elif config["init"] == "warm":
        warm_start(matcher, *FEATURE_TYPES[config["feature"]].warm_start)
    else:
        published_start(matcher)
    return matcher


def _without_paths(value):
    """A setting's value without the places that an entry of online_sources names."""
    if isinstance(value, list):
        return [_without_paths(entry) for entry in value]
    if isinstance(value, dict):
        return {name: entry for name, entry in value.items() if name not in ("path", "scene_list_fn")}
    return value


class Trainer:
    """One process of a training run; `run` goes from the last checkpoint to the end."""

    def __init__(self, config: dict, job: Job):
        if config["batch_size"] % job.world_size:
            raise InputError(f"batch_size {config['batch_size']} does not divide over {job.world_size} processes")
        if config["norm_fn"] == "bn" and job.world_size > 1 and job.device.type == "cpu":
            raise InputError("norm_fn bn with several processes needs GPUs: batch statistics are not shared on the CPU")
        self.precision = check_precision(config["precision"], job.device)
        if config["deterministic"]:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when a GPU multiplies for the first time
            torch.use_deterministic_algorithms(True)
        self.config, self.job = config, job
        self.folder = Path(config["save_path"])
        latest = self.folder / "latest.pth"
        resumes = config["resume_path"] and (Path(config["resume_path"]) != self.folder or latest.exists())
        self.samples = training_samples(config)
        self.val_samples = validation_samples(config, self.samples.scenes)
        self.epoch_steps = config["its_per_epoch"]
        if self.epoch_steps == -1:
            self.epoch_steps = max(1, self.samples.draw_size // config["batch_size"])

        # the weights of a run that is resumed are in its checkpoint, and weight_path may have gone
        self.model = build({**config, "weight_path": None} if resumes else config)
        if config["norm_fn"] == "bn" and job.world_size > 1:
            self.model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.model.to(job.device)
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config["optim"]]
        parameters = self.model.parameters()
        if config["branch_lr"] != 1:  # else one group, as checkpoints from before have it
            parameters = parameter_groups(self.model, config["branch_lr"])
        self.optimizer = kind(parameters, lr=config["lr"], fused=job.device.type == "cuda")
        self.step, self.best = 0, None
        self.monitor = self.batches = None
        self.stop = threading.Event()
        self.validation_due = False  # of the epoch that ended at this step
        self.bad = []  # of this epoch: steps whose loss was not finite, and their pairs
        self.skipped = Counter()  # (source, reason) of pairs that could not be read, up to this step
        if resumes:
            self.resume(config["resume_path"])
        elif latest.exists():
            raise InputError(f"{self.folder} holds a run: give --resume_path {self.folder} to resume it, or "
                             "another save_path")
        if config["compile"]:
            self.model.compile()
        self.parallel = self.model
        if job.world_size > 1:
            self.parallel = DistributedDataParallel(self.model, gradient_as_bucket_view=True)

    def resume(self, path) -> None:
        """Resume from a checkpoint, or from the latest of a run's folder."""
        content = read_state(path)
        path = content["path"]
        for key, value in content["config"].items():
            if key not in FREE_IN_RESUME and _without_paths(value) != _without_paths(self.config.get(key)):
                raise InputError(f"{path} was trained with {key} {value}, now it is {self.config.get(key)}: give the "
                                 "same, or start a new run with weight_path")
        load_weights(self.model, content["model"], path)
        load_optimizer(self.model, self.optimizer, content["optimizer"], path)
        self.step, self.best = content["step"], content["best"]
        self.bad, self.validation_due = list(content["bad"]), content["validation_due"]
        if self.job.is_main:  # they are those of all processes
            self.skipped = Counter({(source, reason): count for source, reason, count in content["skipped"]})
        draw_size = self.samples.draw_size if content["draw_size"] is None else content["draw_size"]
        if content["scenes"] != self.samples.scenes or draw_size != self.samples.draw_size:
            raise InputError(f"{path} was trained on other scenes or photographs: {len(content['scenes'])} scenes, "
                             f"{draw_size} items a draw; now {len(self.samples.scenes)} and {self.samples.draw_size}")

    def save(self, *names: str) -> None:
        """Write the state under each name in the run's folder, in this order; keep the last few epochs' files."""
        skipped = sum(self.job.gather(self.skipped), Counter())
        if not self.job.is_main:
            return
        content = {"model": self.model.state_dict(), "step": self.step,
                   "optimizer": optimizer_state(self.model, self.optimizer),
                   "best": self.best, "validation_due": self.validation_due, "bad": self.bad,
                   "skipped": [[source, reason, count] for (source, reason), count in skipped.items()],
                   "config": self.config, "scenes": self.samples.scenes, "draw_size": self.samples.draw_size,
                   "version": 3}
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
            with tf32(self.precision):
                return self._run()
        finally:
            end_workers(self.batches)
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _run(self) -> str:
        config, job = self.config, self.job
        if job.is_main:
            remove_strays(self.folder)
            write_json(self.folder / "config.json", config)
            self.monitor = Monitor(self.folder, self.step, config["batch_size"])
        last_step = config["epochs"] * self.epoch_steps
        self.deadline = time.monotonic() + 60 * (config["max_minutes"] or math.inf)
        if self.validation_due:
            self._end_epoch(self.step // self.epoch_steps - 1)
        steps = step_batches(self.step, last_step, config["batch_size"], job.rank, job.world_size)
        workers = -(-config["workers"] // job.world_size)
        self.batches = iter(make_loader(self.samples, steps, workers, job.device.type == "cuda"))
        batch = self._next_batch()
        while self.step < last_step:
            epoch = self.step // self.epoch_steps
            end = min((epoch + 1) * self.epoch_steps, last_step)
            if self.monitor:
                self.monitor.begin_epoch(epoch, self.step % self.epoch_steps, self.epoch_steps)
            outcome = ""
            while self.step < end and not outcome:
                batch, outcome = self._step(batch)
            if self.monitor:
                self.monitor.end_epoch(self.step)
            if self.step == end:
                self._end_epoch(epoch)
            if outcome:
                self.save("latest")
                return outcome
        return "finished"

    def _end_epoch(self, epoch: int) -> None:
        """Validate and save; losses left out are counted anew."""
        self.bad = []
        names = [f"epoch_{epoch:05d}", "latest"]
        self.validation_due = self.val_samples is not None
        if self.validation_due:
            self.save("latest")  # validation may fail, or be killed: a resumed run makes up for it
            if self._validate((epoch + 1) % self.config["eval_epochs"] == 0):
                names.insert(0, "best")  # before what says how good it is
            self.validation_due = False
        self.save(*names)

    def _next_batch(self) -> dict | None:
        """The next batch, on its way to the device; None after the last."""
        start = time.perf_counter()
        batch = next(self.batches, None)
        self.waited = time.perf_counter() - start
        if batch is None:
            return None
        if "failed" in batch:
            raise InputError(batch["failed"])
        return {**to_device(batch, self.job.device), "names": batch["names"], "skipped": batch["skipped"]}

    def _step(self, batch: dict) -> tuple[dict | None, str]:
        """One step on a batch; returns the next batch, and why to stop, if so."""
        config, waited = self.config, self.waited
        lr = learning_rate(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("share", 1.0)
        pose_weight = config["pose_weight"] if config["with_pose"] and self.step >= config["pose_start"] else 0.0
        names, skipped = batch.pop("names"), batch.pop("skipped")
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        self.parallel.train()
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.precision, self.job.device):
            out = self.parallel(batch, pose_weight=pose_weight, pose_clamp=config["pose_clamp"],
                                pose_form=config["pose_form"])
        out["loss"].backward()
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        following = self._next_batch()  # while the device is at work: nothing has waited for it yet
        # the gradients have been averaged: a bad loss anywhere spoils them everywhere
        bad = ~(torch.isfinite(out["loss"]) & torch.isfinite(grad_norm))
        flags = [bad, self.stop.is_set(), time.monotonic() > self.deadline]
        (bad, interrupted, late), values, per_iteration = self._read(flags, {"grad_norm": grad_norm, **out})
        self.step += 1
        self.skipped.update(skipped)
        if bad:
            for buffer, before in zip(self.model.buffers(), buffers):  # running statistics took part in the step
                buffer.copy_(before)
            self._skip(batch, names)
        else:
            if config["clip_grad"]:
                torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), config["clip_grad"], grad_norm)
            self.optimizer.step()
        self._log({**values, "lr": lr, "skipped_steps": len(self.bad)}, per_iteration, waited)
        return following, "stopped" if interrupted else "time is up" if late else ""

    def _read(self, flags: list, out: dict) -> tuple[list[bool], dict, dict]:
        """What the host needs of a step: whether a flag is set in any process, and the means over them of the scalars
        and of the arrays (L,) of each iteration that a step has, by name.

        One reduction and one transfer for all of them: here alone the host waits for the device, once a step.
        """
        each = out["per_iteration"]
        names = ["grad_norm", "loss", *each]
        scalars = [out["loss"].new_full((), value) if isinstance(value, bool) else value.detach().float()
                   for value in (*flags, *(out[name] for name in names))]
        flat = torch.cat([torch.stack(scalars), *(values.float() for values in each.values())])
        flat = self.job.mean(flat).cpu().numpy()
        flags, values, arrays = np.split(flat, [len(flags), len(scalars)])
        return (flags > 0).tolist(), dict(zip(names, values.tolist())), dict(zip(each, arrays.reshape(len(each), -1)))

    def _log(self, values: dict, per_iteration: dict, waited: float) -> None:
        if self.monitor:
            self.monitor.log_step(self.step, values, per_iteration, waited)

    def _skip(self, batch: dict, names: list[str]) -> None:
        """Leave out a step whose loss or gradient is not finite, in all processes; too many in an epoch end the run."""
        inputs = [value for value in batch.values() if value.is_floating_point()]
        spoilt = [name for i, name in enumerate(names) if not all(bool(value[i].isfinite().all()) for value in inputs)]
        spoilt, names = (list(itertools.chain(*lists)) for lists in zip(*self.job.gather((spoilt, names))))
        self.bad.append([self.step, spoilt or names])
        if len(self.bad) >= MAX_BAD_STEPS:
            counts = Counter(name for _, pairs in self.bad for name in pairs).most_common(NAMED_PAIRS)
            raise InputError(f"the loss was not finite in {MAX_BAD_STEPS} steps of one epoch (step {self.step}): lower "
                             f"lr, or look at these pairs: {', '.join(name for name, _ in counts)}")

    def _validate(self, due: bool) -> bool:
        """Log what validation says, with poses and pictures if due; whether the loss is the best so far."""
        config, with_pose = self.config, self.config["do_eval"] and due
        self.model.eval()
        with autocast(self.precision, self.job.device):
            numbers, skipped = validate(self.model, self.val_samples, self.job, config["val_pairs"],
                                        config["batch_size"], with_pose)
        self.skipped.update(skipped)
        is_best = numbers["loss"] < (math.inf if self.best is None else self.best)  # never if it is nan
        if is_best:
            self.best = numbers["loss"]
        if self.monitor:
            self.monitor.log_validation(self.step, numbers)
        if self.monitor and with_pose and config["val_images"]:
            try:
                with autocast(self.precision, self.job.device):
                    pictures = match_pictures(self.model, self.val_samples, config["val_images"], self.job.device)
                self.monitor.log_pictures(self.step, pictures)
            except InputError as error:  # which is no reason to end a run
                print(f"no pictures of matches: {error}", file=sys.stderr)
        return is_best


def train(config: dict, job: Job) -> tuple[str, list]:
    """Train as `config` says in this process of the job.

    Returns how it ended, and what could not be read, as (source, reason) pairs.
    """
    folder = Path(config["save_path"])
    check_folder(folder)
    lock = contextlib.nullcontext()
    if job.is_main:
        lock = locked(folder / ".lock", f"another training writes to {folder}: give another save_path")
    try:
        with lock:
            trainer = Trainer(config, job)
            outcome = trainer.run()
    except (MemoryError, RuntimeError) as error:
        if "shared memory" in str(error) or "signal: Bus error" in str(error):
            raise InputError("shared memory (/dev/shm) is full of samples: start the container with docker run "
                             "--shm-size 4g or --ipc=host, or lower workers or batch_size") from None
        # a sample-making process hands on the text of its error alone, and CUDA's libraries have their own errors
        words = ("MemoryError", "can't allocate memory", "killed by signal: Killed", "out of memory", "ALLOC_FAILED")
        if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in words)):
            raise
        raise InputError(f"out of memory with batch_size {config['batch_size']} over {job.world_size} processes, "
                         f"max_keypoints {config['max_keypoints']}, workers {config['workers']}: lower one of them"
                         ) from None
    skipped = sum(job.gather(trainer.skipped), Counter())
    return outcome, [(source, f"{reason} ({count} times)") for (source, reason), count in sorted(skipped.items())]
