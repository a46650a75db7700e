"""Building blocks of the matchers: pointwise MLP, keypoint encoder, attention, propagation layers (SPEC 7).

Everything works on (B, N, C) tensors, keypoints before channels. The weights keep the shapes (out, in, 1) of the
1x1 convolutions of published checkpoints.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

N_HEADS = 4
NORM_EPS = 1e-3
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "lrelu": lambda: nn.LeakyReLU(0.1)}


def normalize_keypoints(keypoints: Tensor, image_size: Tensor) -> Tensor:
    """Pixels (B, N, 2) of images of size (B, 2), (w, h) -> (x - size / 2) / (0.7 max(w, h)), (B, N, 2)."""
    size = image_size.to(keypoints).unsqueeze(-2)
    return (keypoints - size / 2) / (0.7 * size.amax(dim=-1, keepdim=True))


class Linear(nn.Conv1d):
    """A 1x1 convolution, applied to (B, N, C_in) -> (B, N, C_out)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.squeeze(-1), self.bias)


class _Standardize(torch.autograd.Function):
    """(B, N, C) to mean 0 and variance 1 over N; the plain sums are many times faster than var_mean over that axis."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = x - x.mean(dim=1, keepdim=True)
        scale = torch.rsqrt(y.square().mean(dim=1, keepdim=True) + NORM_EPS)
        y.mul_(scale)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        y, scale = ctx.saved_tensors
        along = (grad * y).mean(dim=1, keepdim=True)
        return (grad - grad.mean(dim=1, keepdim=True)).addcmul_(y, along, value=-1).mul_(scale)


class InstanceNorm(nn.Module):
    """Each channel of each view to mean 0 and variance 1 over its keypoints; no parameters."""

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, N, C); mask (B, N), True = counts in the statistics. (B, N, C)."""
        if x.dtype in (torch.float16, torch.bfloat16):
            x = x.float()
        if x.shape[1] == 0:
            return x
        if mask is None:
            return _Standardize.apply(x)
        weight = mask.unsqueeze(-1).to(x.dtype)
        weight = weight / weight.sum(dim=1, keepdim=True).clamp(min=1)
        mean = (x * weight).sum(dim=1, keepdim=True)
        var = ((x - mean).square() * weight).sum(dim=1, keepdim=True)
        return (x - mean) * torch.rsqrt(var + NORM_EPS)


def _batch_norm(norm: nn.Module, views: list[Tensor], masks: list[Tensor | None]) -> list[Tensor]:
    """BatchNorm over the keypoints of all views and samples together: one update of the running statistics."""
    tokens = [x.flatten(0, 1) if m is None or not norm.training else x[m] for x, m in zip(views, masks)]
    normed = norm(torch.cat(tokens)).split([len(t) for t in tokens])
    out = []
    for x, m, y in zip(views, masks, normed):
        if m is None or not norm.training:
            out.append(y.view_as(x))
        else:
            out.append(torch.zeros_like(x, dtype=y.dtype).masked_scatter(m.unsqueeze(-1), y))
    return out


class MLP(nn.Sequential):
    """Linear layers, with a norm and an activation after each but the last."""

    def __init__(self, channels: list[int], norm_fn: str | None, ac_fn: str):
        modules = []
        for i, (c_in, c_out) in enumerate(zip(channels[:-1], channels[1:])):
            modules.append(Linear(c_in, c_out))
            if i < len(channels) - 2:
                if norm_fn == "in":
                    modules.append(InstanceNorm())
                elif norm_fn == "bn":
                    modules.append(nn.BatchNorm1d(c_out, eps=NORM_EPS))
                elif norm_fn is not None:
                    raise ValueError(f"norm_fn {norm_fn!r}: expected 'in', 'bn' or None")
                modules.append(ACTIVATIONS[ac_fn]())
        super().__init__(*modules)
        nn.init.zeros_(self[-1].bias)

    def forward(self, views: list[Tensor], masks: list[Tensor | None], per_sample: bool = False) -> list[Tensor]:
        """views: (B, N_v, C_in) each; masks: (B, N_v) or None each, True = real keypoint. List of (B, N_v, C_out).

        per_sample: batch statistics are taken of one sample after the other instead of over the batch (SPEC 11).
        """
        for module in self:
            if isinstance(module, InstanceNorm):
                views = [module(x, m) for x, m in zip(views, masks)]
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                if per_sample and module.training:
                    samples = zip(*(x.split(1) for x in views))
                    sample_masks = zip(*([None] * len(views[0]) if m is None else m.split(1) for m in masks))
                    normed = [_batch_norm(module, list(x), list(m)) for x, m in zip(samples, sample_masks)]
                    views = [torch.cat(parts) for parts in zip(*normed)]
                else:
                    views = _batch_norm(module, views, masks)
            else:
                views = [module(x) for x in views]
        return views


class KeypointEncoder(nn.Module):
    """Position and score of a keypoint -> a vector to add to its descriptor."""

    def __init__(self, dim: int, norm_fn: str | None, ac_fn: str):
        super().__init__()
        self.encoder = MLP([3, 32, 64, 128, 256, dim], norm_fn, ac_fn)

    def forward(self, norm_keypoints: Tensor, scores: Tensor, mask: Tensor | None) -> Tensor:
        """norm_keypoints (B, N, 2), scores (B, N), mask (B, N) or None -> (B, N, D)."""
        return self.encoder([torch.cat([norm_keypoints, scores.unsqueeze(-1)], dim=-1)], [mask])[0]


def _head_major(weight: Tensor) -> Tensor:
    """Reorder the first dimension so that each head's channels lie together: channel c belongs to head c mod 4."""
    return weight.view(-1, N_HEADS, *weight.shape[1:]).transpose(0, 1).reshape(weight.shape)


def project_heads(linear: Linear, x: Tensor) -> Tensor:
    """x (B, N, D) -> (B, heads, N, D / heads), by a linear layer whose output interleaves the heads."""
    y = F.linear(x, _head_major(linear.weight.squeeze(-1)), _head_major(linear.bias))
    return y.view(*y.shape[:2], N_HEADS, y.shape[2] // N_HEADS).transpose(1, 2)


def merge_heads(linear: Linear, message: Tensor) -> Tensor:
    """message (B, heads, N, D / heads) -> (B, N, D), by a linear layer whose input interleaves the heads."""
    return F.linear(message.transpose(1, 2).flatten(2), _head_major(linear.weight.squeeze(-1).T).T, linear.bias)


class AttentionMatrix:
    """softmax(Q K^T / sqrt(D / heads)) of one direction, kept as queries and keys.

    queries (B, heads, N, d), keys (B, heads, M, d), key_mask (B, M) or None: keys that are masked out get the lowest
    logit; where there is no key at all, messages are zero. Another layer may use the same matrix with values of its
    own.
    """

    def __init__(self, queries: Tensor, keys: Tensor, key_mask: Tensor | None):
        self.queries, self.keys, self.key_mask = queries, keys, key_mask

    def _bias(self) -> Tensor | None:
        if self.key_mask is None:
            return None
        lowest = torch.finfo(self.queries.dtype).min
        bias = torch.zeros(self.key_mask.shape, dtype=self.queries.dtype, device=self.queries.device)
        # without any key all are let in, as in half precision lowest logits alone are -inf and give NaN
        masked = ~self.key_mask & self.key_mask.any(dim=1, keepdim=True)
        return bias.masked_fill(masked, lowest)[:, None, None, :]

    def __matmul__(self, values: Tensor) -> Tensor:
        """values (B, heads, M, d) -> messages (B, heads, N, d)."""
        if self.keys.shape[2] == 0:
            return torch.zeros_like(self.queries)
        messages = F.scaled_dot_product_attention(self.queries, self.keys, values, attn_mask=self._bias())
        if self.key_mask is None:
            return messages
        return messages * self.key_mask.any(dim=1).view(-1, 1, 1, 1)

    @torch.no_grad()
    def received_mass(self, query_mask: Tensor | None) -> Tensor:
        """Attention each key receives, summed over heads and the real queries (query_mask (B, N)): (B, M), sum 1."""
        bias = self._bias()
        mass = 0
        for head in range(N_HEADS):
            logits = self.queries[:, head] @ self.keys[:, head].transpose(1, 2) / self.queries.shape[-1] ** 0.5
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if bias is not None:
                logits = logits + bias[:, 0]
            attention = logits.softmax(dim=-1)
            if query_mask is not None:
                attention = attention * query_mask.unsqueeze(-1)
            mass = mass + attention.sum(dim=1)
        return mass / mass.sum(dim=-1, keepdim=True)

    def select(self, queries: Tensor, keys: Tensor) -> "AttentionMatrix":
        """The matrix between some of its queries and some of its keys: int64 indices (n,), (m,)."""
        mask = None if self.key_mask is None else self.key_mask[:, keys]
        return AttentionMatrix(self.queries[:, :, queries], self.keys[:, :, keys], mask)


class Attention(nn.Module):
    """Multi-head attention of a layer that computes its own matrix."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj = nn.ModuleList([Linear(dim, dim) for _ in range(3)])  # query, key, value
        self.merge = Linear(dim, dim)


class OwnAttentionLayer(nn.Module):
    """A self- or cross-attention layer: the matrices of both directions, and the residuals of both views."""

    def __init__(self, dim: int, norm_fn: str | None, ac_fn: str):
        super().__init__()
        self.attn = Attention(dim)
        self.mlp = MLP([2 * dim, 2 * dim, dim], norm_fn, ac_fn)

    def forward(self, x0, x1, cross: bool, mask0, mask1, keep0, keep1, per_sample: bool):
        """x0 (B, N0, D), x1 (B, N1, D); mask: real keypoints, keep: keys in use, (B, N) or None each.

        Returns x0, x1 after the residual update, and the two attention matrices (queries of view 0, of view 1).
        """
        q0, k0, v0 = (project_heads(linear, x0) for linear in self.attn.proj)
        q1, k1, v1 = (project_heads(linear, x1) for linear in self.attn.proj)
        if cross:
            k0, v0, keep0, k1, v1, keep1 = k1, v1, keep1, k0, v0, keep0
        attention = AttentionMatrix(q0, k0, keep0), AttentionMatrix(q1, k1, keep1)
        x0, x1 = _update(self.mlp, x0, x1, merge_heads(self.attn.merge, attention[0] @ v0),
                         merge_heads(self.attn.merge, attention[1] @ v1), mask0, mask1, per_sample)
        return x0, x1, attention


class SharedAttentionLayer(nn.Module):
    """A layer that passes values of its own through attention matrices of an earlier layer of the same kind."""

    def __init__(self, dim: int, norm_fn: str | None, ac_fn: str):
        super().__init__()
        self.proj = Linear(dim, dim)
        self.merge = Linear(dim, dim)
        self.mlp = MLP([2 * dim, 2 * dim, dim], norm_fn, ac_fn)

    def forward(self, x0, x1, cross: bool, attention, mask0, mask1, per_sample: bool):
        """As `OwnAttentionLayer.forward`, with the two matrices given. Returns x0, x1."""
        v0, v1 = project_heads(self.proj, x0), project_heads(self.proj, x1)
        if cross:
            v0, v1 = v1, v0
        return _update(self.mlp, x0, x1, merge_heads(self.merge, attention[0] @ v0),
                       merge_heads(self.merge, attention[1] @ v1), mask0, mask1, per_sample)


def _update(mlp: MLP, x0, x1, message0, message1, mask0, mask1, per_sample):
    """x + MLP([x, message]) for both views."""
    views = [torch.cat([x0, message0], dim=-1), torch.cat([x1, message1], dim=-1)]
    residual0, residual1 = mlp(views, [mask0, mask1], per_sample)
    return x0 + residual0, x1 + residual1
