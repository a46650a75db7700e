"""How good a matcher is on held-out samples: loss, matches, poses, and pictures of them."""
from pathlib import Path

import numpy as np
import torch

from tools.cli import InputError
from tools.distributed import Job
from tools.files import read_image
from tools.metrics import epipolar_error, pose_auc, pose_error
from tools.pose import estimate_pose
from tools.visualize import draw_matches
from training.data import Samples, collate, make_loader, step_batches

POSE_THRESHOLD = 3.0  # pixels, of the estimator
AUC_THRESHOLDS = (5, 10, 20)  # degrees
N_PICTURES = 4


def to_device(batch: dict, device: torch.device) -> dict:
    """The tensors of a batch, on a device, descriptors in single precision."""
    tensors = {key: value.to(device, non_blocking=True) for key, value in batch.items() if torch.is_tensor(value)}
    return {key: value.float() if value.dtype == torch.float16 else value for key, value in tensors.items()}


def _matched(batch: dict, matches0: torch.Tensor, i: int, name: str) -> list[np.ndarray]:
    """`name`0 and `name`1 of the matched keypoints of sample i, row by row."""
    matches = matches0[i].cpu().numpy()
    rows = np.flatnonzero(matches >= 0)
    return [batch[f"{name}0"][i].numpy()[rows], batch[f"{name}1"][i].numpy()[matches[rows]]]


def _pose_errors(batch: dict, matches0: torch.Tensor) -> list[float]:
    """Pose error in degrees, inf where there is no pose, of each sample."""
    errors = []
    for i in range(len(matches0)):
        K0, K1, T_0to1 = (batch[name][i].double().numpy() for name in ("K0", "K1", "T_0to1"))
        pose = estimate_pose(*_matched(batch, matches0, i, "keypoints"), K0, K1, POSE_THRESHOLD)
        errors.append(np.inf if pose is None else max(pose_error(T_0to1, *pose[:2])))
    return errors


@torch.no_grad()
def validate(model, samples: Samples, job: Job, n_samples: int, batch_size: int, with_pose: bool
             ) -> tuple[dict[str, float], list[tuple[str, str]]]:
    """Loss, precision and recall of a matcher in evaluation mode, over all processes of the job; with_pose: also
    auc5, auc10, auc20 of the pose error.

    Returns them, and (source, reason) of the pairs that this process could not read. InputError if it could read none.
    """
    n_batches = max(1, min(n_samples, samples.draw_size) // batch_size)
    batches = step_batches(0, n_batches, batch_size, job.rank, job.world_size)
    totals, errors, skipped = torch.zeros(4, dtype=torch.float64, device=job.device), [], []
    for batch in make_loader(samples, batches, 0, False):
        if "failed" in batch:
            raise InputError(f"validation: {batch['failed']}")
        skipped += batch["skipped"]
        tensors = to_device(batch, job.device)
        out = model(tensors)
        truth = tensors["target0"]
        is_match = (truth >= 0) & (truth < tensors["target1"].shape[1])
        right = is_match & (out["matches0"] == truth)
        totals += torch.stack([out["loss"], right.sum(), (out["matches0"] >= 0).sum(), is_match.sum()])
        if with_pose:
            errors += _pose_errors(batch, out["matches0"].cpu())
    loss, right, predicted, true = job.mean(totals.float()).cpu().tolist()
    numbers = {"loss": loss / n_batches, "precision": right / max(predicted, 1e-9), "recall": right / max(true, 1e-9)}
    if with_pose:
        aucs = pose_auc(np.concatenate(job.gather(errors)), AUC_THRESHOLDS)
        numbers |= {f"auc{threshold}": auc for threshold, auc in zip(AUC_THRESHOLDS, aucs)}
    return numbers, skipped


@torch.no_grad()
def match_pictures(model, samples: Samples, images, device: torch.device) -> list[np.ndarray]:
    """Pictures (H, W, 3) BGR of the matches of the first samples, by epipolar error; always the same samples.

    images: the folder that image paths of the dump are relative to. InputError if an image is not there.
    """
    pictures = []
    for k in range(min(N_PICTURES, samples.draw_size)):
        batch = collate([samples[k]])
        if "failed" in batch:
            raise InputError(batch["failed"])
        matches0, (paths,) = model(to_device(batch, device))["matches0"], batch["image_paths"]
        errors = epipolar_error(*_matched(batch, matches0, 0, "camera_keypoints"), batch["E"][0].double().numpy())
        pictures.append(draw_matches(*(read_image(Path(images) / path) for path in paths),
                                     *_matched(batch, matches0, 0, "keypoints"), ["   ".join(paths)], errors=errors))
    return pictures
