# ruff: noqa: E731
"""Deterministic weights and inputs for the golden parity vectors in this folder.

Every parameter is drawn from its own name, so a golden file needs no weights:
two implementations whose state dicts have the same keys and shapes get the same
numbers, on every platform (NumPy's legacy RandomState is frozen).
"""
import zlib

import numpy as np
import torch


def fill_(module: torch.nn.Module, salt: str = "", gain: float = 1.2) -> torch.nn.Module:
    """Overwrite every floating-point entry of module.state_dict(), in place.

    weights (ndim > 1)  normal, std 1/sqrt(fan_in), damped in kenc and mlp so that the
                        descriptors survive; final_proj is near a multiple of I
    other vectors       normal, std 0.02 (BatchNorm weight and running_var: 1 + |n|)
    bin_score           1.0
    """
    state = module.state_dict()
    for name, value in state.items():
        if not value.is_floating_point():
            continue
        rng = np.random.RandomState(zlib.crc32((salt + name).encode()))
        noise = rng.standard_normal(tuple(value.shape)).astype(np.float32)
        if name == "bin_score":
            new = np.ones_like(noise)
        elif noise.ndim > 1:
            fan_in = int(np.prod(noise.shape[1:]))
            new = noise / np.sqrt(fan_in)
            if name.startswith("final_proj"):
                scale = gain * noise.shape[0] ** 0.25
                new = 0.1 * scale * new + scale * np.eye(*noise.shape[:2], dtype=np.float32).reshape(noise.shape)
            elif name.startswith("kenc."):
                new = 0.2 * new
            elif ".mlp." in name:
                new = 0.2 * new
        else:
            new = 0.02 * noise
            if name.endswith("running_var") or (name.endswith("weight") and noise.ndim == 1):
                new = 1.0 + np.abs(new)
        value.copy_(torch.from_numpy(np.array(new, dtype=np.float32, order="C").reshape(tuple(value.shape))))
    module.load_state_dict(state)
    return module


def two_views(n0: int, n1: int, dim: int, batch: int = 1, overlap: float = 0.6, seed: int = 0) -> dict:
    """Random features of two views that share a fraction of their keypoints.

    Returns numpy float32 arrays: descriptors{0,1} (B, N, D), unit length;
    norm_keypoints{0,1} (B, N, 2) in about [-0.7, 0.7]; scores{0,1} (B, N) in [0, 1];
    and gt0 (B, n0) int64, the true index in view 1 of each keypoint of view 0, or -1.
    """
    rng = np.random.RandomState(seed)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    shared = int(overlap * min(n0, n1))
    out = {k: [] for k in ("descriptors0", "descriptors1", "norm_keypoints0", "norm_keypoints1",
                           "scores0", "scores1", "gt0")}
    for _ in range(batch):
        d0 = unit(rng.standard_normal((n0, dim)))
        d1 = unit(rng.standard_normal((n1, dim)))
        k0 = rng.uniform(-0.7, 0.7, (n0, 2))
        k1 = rng.uniform(-0.7, 0.7, (n1, 2))
        i0, i1 = rng.permutation(n0)[:shared], rng.permutation(n1)[:shared]
        d1[i1] = unit(d0[i0] + 0.4 * unit(rng.standard_normal((shared, dim))))
        k1[i1] = 0.9 * k0[i0] + 0.05
        gt = np.full(n0, -1, np.int64)
        gt[i0] = i1
        for key, value in zip(out, (d0, d1, k0, k1, rng.uniform(0, 1, n0), rng.uniform(0, 1, n1), gt)):
            out[key].append(value)
    return {k: np.stack(v).astype(np.int64 if k == "gt0" else np.float32) for k, v in out.items()}


def matching_mask(gt0: np.ndarray, n1: int) -> np.ndarray:
    """Ground-truth assignment (B, n0+1, n1+1) with a dustbin row and column, from gt0 (B, n0)."""
    batch, n0 = gt0.shape
    mask = np.zeros((batch, n0 + 1, n1 + 1), np.float32)
    for b in range(batch):
        for i, j in enumerate(gt0[b]):
            mask[b, i, j if j >= 0 else n1] = 1
        mask[b, n0, np.setdiff1d(np.arange(n1), gt0[b])] = 1
    return mask
