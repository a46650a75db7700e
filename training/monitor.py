"""What one watches while a matcher is trained: a progress bar, a line an epoch, and TensorBoard."""
import time
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from tools.files import write_image

RATE_STEPS = 10  # steps between values of speed, and between those of each iteration


def precision_recall(counts: dict) -> dict:
    """Of the matches that the counts of a matcher's forward stand for: numbers, or arrays (L,) of each iteration's."""
    return {"precision": counts["acc_corr"] / np.maximum(counts["total_matches"], 1e-9),
            "recall": counts["acc_corr"] / np.maximum(counts["total_acc_corr"], 1e-9)}


class Monitor:
    """The log of a run, kept by its main process."""

    def __init__(self, folder: Path, step: int, batch_size: int):
        """step: where the run begins or resumes; what an earlier run logged after it is dropped."""
        self.folder, self.batch_size = folder, batch_size
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def begin_epoch(self, epoch: int, done: int, n_steps: int) -> None:
        """An epoch of n_steps begins, of which `done` were before."""
        self.title = f"epoch {epoch}"
        self.bar = tqdm(desc=self.title, initial=done, total=n_steps, unit="step", disable=None)
        self.began, self.history, self.waited = time.perf_counter(), [], []
        self.since = self.began

    def log_step(self, step: int, values: dict, per_iteration: dict, waited: float) -> None:
        """Log a step. values: scalars by name; per_iteration: arrays (L,) by name; waited: seconds, for samples."""
        values = {**values, **precision_recall(values)}
        for name, value in values.items():
            self.writer.add_scalar(f"train/{name}", value, step)
        self.waited.append(waited)
        if len(self.waited) == RATE_STEPS:
            now = time.perf_counter()
            self.writer.add_scalar("speed/samples_per_second", RATE_STEPS * self.batch_size / (now - self.since), step)
            self.writer.add_scalar("speed/data_wait_share", sum(self.waited) / (now - self.since), step)
            self.since, self.waited = now, []
            each = {**per_iteration, **precision_recall(per_iteration),
                    "loss": per_iteration["matching_loss_corr"] + per_iteration["matching_loss_incorr"]}
            for name in ("loss", "precision", "recall", "pose_loss"):
                for t, value in enumerate(each.get(name, ())):
                    self.writer.add_scalar(f"iteration_{name}/{t:02d}", value, step)
        self.history.append([values[name] for name in ("loss", "precision", "recall")])
        self.bar.set_postfix_str(f"loss {values['loss']:.3f}, recall {values['recall']:.2f}, "
                                 f"{self._rate():.1f} samples/s", refresh=False)
        self.bar.update()

    def _rate(self) -> float:
        """Samples a second in this epoch."""
        return len(self.history) * self.batch_size / (time.perf_counter() - self.began)

    def end_epoch(self, step: int) -> None:
        """An epoch ends, or is broken off, after `step` steps of the run."""
        self.bar.close()
        finite = [values for values in self.history if np.isfinite(values).all()]  # steps left out are not
        if finite:
            loss, precision, recall = np.mean(finite, axis=0)
            tqdm.write(f"{self.title}: step {step}, loss {loss:.4f}, precision {precision:.3f}, recall {recall:.3f}, "
                       f"{self._rate():.1f} samples/s")
        elif self.history:
            tqdm.write(f"{self.title}: step {step}, no loss was finite")
        self.writer.flush()

    def log_validation(self, step: int, numbers: dict[str, float]) -> None:
        """Log what `training.validation.validate` returns."""
        for name, value in numbers.items():
            self.writer.add_scalar(f"val/{name}", value, step)
        tqdm.write(f"step {step}: validation " + ", ".join(f"{name} {value:.4f}" for name, value in numbers.items()))

    def log_pictures(self, step: int, pictures: list[np.ndarray]) -> None:
        """Log pictures (H, W, 3) BGR, and write them to the run's folder."""
        for i, picture in enumerate(pictures):
            self.writer.add_image(f"val/matches_{i}", picture[:, :, ::-1], step, dataformats="HWC")
            write_image(self.folder / "pictures" / f"step_{step:07d}_{i}.jpg", picture)
