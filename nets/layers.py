"""Building blocks of the matchers: pointwise MLP, keypoint encoder, attention layers.

Everything works on (B, N, C) tensors, keypoints before channels. The two views of a pair lie one after the other in
one tensor, (B, N0 + N1, C), so that what looks at each keypoint alone is one matrix product for both.
"""
import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nets.layout import N_HEADS

NORM_EPS = 1e-3
BLOCK_ROWS = 512  # of an attention matrix, so that a block of it stays in the cache
# before a softmax, in bfloat16, which rounds 4 to 0.02 and 200 to 1: greater ones are taken again, less their greatest
MOST_LOGIT = 4
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "lrelu": lambda: nn.LeakyReLU(0.1)}


def normalize_keypoints(keypoints: Tensor, image_size: Tensor) -> Tensor:
    """Pixels (B, N, 2) of images of size (B, 2), (w, h) -> (x - size / 2) / (0.7 max(w, h)), (B, N, 2)."""
    size = image_size.to(keypoints).unsqueeze(-2)
    return (keypoints - size / 2) / (0.7 * size.amax(dim=-1, keepdim=True))


class Views:
    """How the keypoints of a batch lie in (B, N0 + N1, C).

    sizes: number of keypoints of each view; masks: (B, N_v) or None each, True = real keypoint, False = padding.
    """

    def __init__(self, sizes: tuple[int, int], masks: tuple[Tensor | None, Tensor | None]):
        self.sizes, self.masks = sizes, masks
        self._weights = None

    def split(self, x: Tensor, dim: int = 1) -> tuple[Tensor, ...]:
        """(B, N0 + N1, ...) -> (B, N_v, ...) of each view; dim: that of the keypoints."""
        return x.split(self.sizes, dim)

    def mean_weights(self, x: Tensor) -> list[Tensor]:
        """What makes the mean over a view's real keypoints a matrix product: (B, 1, N_v), 0 where none is real.

        Of the type of x (B, ...), float32 or wider. They are the same for every layer, and made once.
        """
        if self._weights is None:
            self._weights, x = [], x.new_empty(len(x), 0, dtype=torch.promote_types(x.dtype, torch.float32))
            for n, mask in zip(self.sizes, self.masks):
                real = x.new_ones(len(x), n) if mask is None else mask.to(x.dtype)
                self._weights.append((real / real.sum(dim=1, keepdim=True).clamp(min=1)).unsqueeze(1))
        return self._weights

    def joint_mask(self, x: Tensor) -> Tensor | None:
        """Real keypoints of both views, (B, N0 + N1), or None if all are."""
        if all(mask is None for mask in self.masks):
            return None
        return torch.cat([x.new_ones(len(x), n, dtype=torch.bool) if mask is None else mask
                          for n, mask in zip(self.sizes, self.masks)], dim=1)


def _is_cast(x: Tensor) -> bool:
    """Whether autocast is at work on the device of x."""
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)


def narrow(x: Tensor) -> Tensor:
    """x in the precision that linear layers compute in: cast once, where autocast would cast it for each of them."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if _is_cast(x) else x


class _Standardize(torch.autograd.Function):
    """Each channel of a view to mean 0 and variance 1 over its real keypoints; padding becomes 0.

    For the gradient it keeps the result, in the precision of x, where autograd would keep a copy in single precision.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weights: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, N, C); weights (B, 1, N): what makes a mean over the real keypoints a matrix product; mask (B, N)."""
        y = x.to(weights.dtype)
        y = y - (y * weights.mT).sum(dim=1, keepdim=True)
        scale = torch.rsqrt(weights @ y.square() + NORM_EPS)
        y = y * scale
        if mask is not None:
            y = y * mask.unsqueeze(-1)
        y = y.to(x.dtype)
        ctx.save_for_backward(y, scale, weights, mask)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        y, scale, weights, mask = ctx.saved_tensors
        g, y = grad.to(scale.dtype), y.to(scale.dtype)
        grad_x = (g - weights @ g - y * (weights @ (g * y))) * scale
        if mask is not None:
            grad_x = grad_x * mask.unsqueeze(-1)
        return grad_x.to(grad.dtype), None, None


class InstanceNorm(nn.Module):
    """Each channel of each view to mean 0 and variance 1 over its real keypoints; no parameters."""

    def center(self, x: Tensor, views: Views) -> Tensor:
        """x (B, N, C) less its mean over the real keypoints of each view, narrowed: what to give to a linear layer in
        front of the norm. The norm takes off the mean anyway, but bfloat16 would round with respect to it, and trained
        networks have means of up to 26 standard deviations there."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            parts = zip(views.split(x), views.mean_weights(x))
            x = torch.cat([part - weights @ part for part, weights in parts], dim=1)
        return narrow(x)

    def forward(self, x: Tensor, views: Views) -> Tensor:
        """x (B, N, C) -> (B, N, C); means and variances are taken in float32 or wider."""
        with torch.autocast(x.device.type, enabled=False):
            return torch.cat([_Standardize.apply(*view) for view in zip(
                views.split(x), views.mean_weights(x), views.masks)], dim=1)


def _batch_norm(norm: nn.Module, x: Tensor, views: Views, together: bool) -> Tensor:
    """BatchNorm over the real keypoints of all samples: running statistics of both views together, or of one by one."""
    if not norm.training:
        return norm(x.flatten(0, 1)).view_as(x)
    parts = [(x, views.joint_mask(x))] if together else zip(views.split(x), views.masks)
    out = []
    for part, mask in parts:
        if mask is None:
            out.append(norm(part.flatten(0, 1)).view_as(part))
        else:
            y = norm(part[mask])
            out.append(torch.zeros_like(part, dtype=y.dtype).masked_scatter(mask.unsqueeze(-1), y))
    return torch.cat(out, dim=1)


class MLP(nn.Sequential):
    """Linear layers, with a norm and an activation after each but the last.

    together: whether batch norm takes statistics of both views at once.
    """

    def __init__(self, channels: list[int], norm_fn: str | None, ac_fn: str, together: bool = False):
        modules = []
        for c_in, c_out in zip(channels[:-1], channels[1:]):
            modules.append(nn.Linear(c_in, c_out))
            if norm_fn == "in":
                modules.append(InstanceNorm())
            elif norm_fn == "bn":
                modules.append(nn.BatchNorm1d(c_out, eps=NORM_EPS))
            elif norm_fn is not None:
                raise ValueError(f"norm_fn {norm_fn!r}: expected 'in', 'bn' or None")
            modules.append(ACTIVATIONS[ac_fn]())
        n_after = 1 if norm_fn is None else 2
        super().__init__(*modules[:-n_after])
        self.together = together
        nn.init.zeros_(self[-1].bias)

    def forward(self, x: Tensor, views: Views) -> Tensor:
        """x (B, N0 + N1, C_in) -> (B, N0 + N1, C_out)."""
        for module, following in itertools.pairwise([*self, None]):
            if isinstance(following, InstanceNorm) and _is_cast(x):
                x = module(following.center(x, views))
            elif isinstance(module, InstanceNorm):
                x = module(x, views)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                x = _batch_norm(module, x, views, self.together)
            else:
                x = module(x)
        return x


class KeypointEncoder(nn.Module):
    """Position and score of a keypoint -> a vector to add to its descriptor."""

    def __init__(self, dim: int, norm_fn: str | None, ac_fn: str):
        super().__init__()
        self.encoder = MLP([3, 32, 64, 128, 256, dim], norm_fn, ac_fn)

    def forward(self, norm_keypoints: Tensor, scores: Tensor, views: Views) -> Tensor:
        """norm_keypoints (B, N0 + N1, 2), scores (B, N0 + N1) -> (B, N0 + N1, D)."""
        return self.encoder(torch.cat([norm_keypoints, scores.unsqueeze(-1)], dim=-1), views)


def _goes_by_blocks(x: Tensor) -> bool:
    """Whether attention is taken block by block, as products in bfloat16 with a softmax between.

    On a CPU this is twice as fast as fused attention, which is no faster in bfloat16 than in float32. It is written
    for matching alone.
    """
    return (x.device.type == "cpu" and x.dtype == torch.bfloat16 and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling())


def _blocks(queries: Tensor, keys: Tensor, mask: Tensor | None, matrix: Tensor | None = None
            ) -> Iterator[tuple[tuple, Tensor]]:
    """Yield the attention matrix block by block: (b, head, queries), (n, M).

    queries (B, heads, N, d), keys (B, heads, M, d), mask (B, 1, 1, M) bool or None: as `attend` takes them. matrix
    (B, heads, N, M): the memory of the blocks; without, each takes that of the one before.
    """
    (n, dim), m = queries.shape[2:], keys.shape[2]
    memory = queries.new_empty(min(BLOCK_ROWS, n), m)
    bias = queries.new_zeros(len(queries), m)
    if mask is not None:
        bias.masked_fill_(~mask[:, 0, 0], -torch.inf)
    for b, head, start in itertools.product(*map(range, queries.shape[:2]), range(0, n if m else 0, BLOCK_ROWS)):
        place = b, head, slice(start, start + BLOCK_ROWS)
        rows, columns = queries[place], keys[b, head].T
        block = memory[:len(rows)] if matrix is None else matrix[place]
        torch.addmm(bias[b], rows, columns, alpha=dim ** -0.5, out=block)
        greatest = block.amax(dim=1, keepdim=True)
        if greatest.max() > MOST_LOGIT:
            torch.addmm(greatest, rows, columns, beta=-1, alpha=dim ** -0.5, out=block).add_(bias[b])
        yield place, torch.softmax(block, dim=-1, out=block)


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V of queries (B, heads, N, d) and keys, values (B, heads, M, d): (B, heads, N, d).

    mask (B, 1, 1, M) bool or None: which of the M take part.
    """
    if not _goes_by_blocks(queries):
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    messages = torch.empty_like(queries)
    for (b, head, rows), block in _blocks(queries, keys, mask):
        messages[b, head, rows] = block @ values[b, head]
    return messages


class Attention:
    """softmax(Q K^T / sqrt(d)) of one direction, by which this layer and later ones pass values of their own.

    queries (B, heads, N, d); keys (B, heads, M, d); keep (B, M) bool or None: which keypoints are keys (None: all).
    Where a sample has none, its messages are zero. is_shared: whether it is used more than once: the matrix is then
    stored, on a CPU and up to MAX_STORED bytes; elsewhere it is faster to compute it again. For gradients in bfloat16
    it is stored however often it is used: those of fused attention take far longer. memory: the stored matrix
    of an earlier layer, not needed any more.
    """

    MAX_STORED = 2 ** 24

    def __init__(self, queries: Tensor, keys: Tensor, keep: Tensor | None, is_shared: bool,
                 memory: Tensor | None = None):
        self.queries, self.keys, self.keep, self.is_shared = queries, keys, keep, is_shared
        self.mask = self.any_key = None
        if keep is not None:
            self.any_key = keep.any(dim=1).view(-1, 1, 1, 1)
            # a row of a softmax needs an entry: where there is no key, all are let in
            self.mask = keep[:, None, None, :] | ~self.any_key
        self.stored, self.by_blocks = None, _goes_by_blocks(queries)
        if ((is_shared or (queries.dtype == torch.bfloat16 and torch.is_grad_enabled()))
                and queries.device.type == "cpu" and queries.dtype != torch.float16
                and not torch.compiler.is_compiling()
                and queries.shape[:3].numel() * keys.shape[2] * queries.element_size() <= self.MAX_STORED):
            self.stored = self._matrix(queries.dtype, memory)

    def _matrix(self, dtype: torch.dtype, memory: Tensor | None = None) -> Tensor:
        """(B, heads, N, M); in `memory` if it fits: new memory costs as much as a softmax."""
        shape = *self.queries.shape[:3], self.keys.shape[2]
        if torch.is_grad_enabled() or (memory is not None and (memory.dtype, memory.shape) != (dtype, shape)):
            memory = None
        with torch.autocast(self.queries.device.type, enabled=False):
            if dtype == torch.bfloat16 and not torch.is_grad_enabled():
                memory = self.queries.new_empty(shape) if memory is None else memory
                for _ in _blocks(self.queries, self.keys, self.mask, memory):
                    pass
                return memory
            queries = (self.queries * self.queries.shape[-1] ** -0.5).to(dtype)
            logits = torch.matmul(queries, self.keys.to(dtype).transpose(2, 3), out=memory)
            if dtype == torch.bfloat16:  # which keeps no more than halves of 100: taken again, less the greatest
                greatest = logits.detach().amax(dim=-1, keepdim=True).flatten(0, 1)
                queries, keys = self.queries.flatten(0, 1), self.keys.flatten(0, 1).mT
                logits = torch.baddbmm(greatest, queries, keys, beta=-1, alpha=queries.shape[-1] ** -0.5).view(shape)
            if self.mask is not None:
                logits.masked_fill_(~self.mask, -torch.inf)
            return torch.softmax(logits, dim=-1, out=None if logits.requires_grad else logits)

    def messages(self, values: Tensor) -> Tensor:
        """values (B, heads, M, d) -> (B, heads, N, d)."""
        if self.keys.shape[2] == 0:
            return torch.zeros_like(self.queries)
        if self.stored is None:
            messages = attend(self.queries, self.keys, values, self.mask)
        else:
            messages = self.stored.to(values.dtype) @ values
        return messages if self.any_key is None else messages * self.any_key

    def received_mass(self, query_mask: Tensor | None) -> Tensor:
        """Attention each keypoint receives, summed over heads and real queries (query_mask (B, N)): (B, M), sum 1."""
        with torch.no_grad(), torch.autocast(self.queries.device.type, enabled=False):
            wide = torch.promote_types(self.queries.dtype, torch.float32)
            weights = self.queries.new_ones(1) if query_mask is None else query_mask[:, None, None, :]
            weights = weights.to(wide).expand(*self.queries.shape[:2], 1, self.queries.shape[2])
            if self.stored is None and self.by_blocks:
                mass = weights.new_zeros(len(self.keys), self.keys.shape[2])
                for (b, head, rows), block in _blocks(self.queries, self.keys, self.mask):
                    mass[b] += weights[b, head, 0, rows] @ block.to(wide)
            else:
                matrix = self._matrix(wide) if self.stored is None else self.stored.to(wide)
                mass = (weights @ matrix).sum(dim=(1, 2))
            return mass / mass.sum(dim=-1, keepdim=True)

    def select(self, queries: Tensor, keys: Tensor) -> "Attention":
        """The attention between some of its queries and some of its keys: int64 indices (n,), (m,)."""
        keep = None if self.keep is None else self.keep[:, keys]
        return Attention(self.queries[:, :, queries], self.keys[:, :, keys], keep, self.is_shared)


class AttentionLayer(nn.Module):
    """x + MLP([x, message]), self- or cross-attention.

    shares: it has values alone, and an earlier layer's attention; is_shared: a later layer will share that of this one.
    """

    def __init__(self, dim: int, norm_fn: str | None, ac_fn: str, together: bool, shares: bool, is_shared: bool):
        super().__init__()
        self.shares, self.is_shared = shares, is_shared
        if shares:  # names as published
            self.proj, self.merge = nn.Linear(dim, dim), nn.Linear(dim, dim)
        else:
            proj = nn.ModuleList([nn.Linear(dim, dim) for _ in range(3)])  # queries, keys, values
            self.attn = nn.ModuleDict({"proj": proj, "merge": nn.Linear(dim, dim)})
        self.mlp = MLP([2 * dim, 2 * dim, dim], norm_fn, ac_fn, together)

    def forward(self, x: Tensor, views: Views, cross: bool, keep: tuple[Tensor | None, Tensor | None],
                attention: tuple[Attention, Attention] | None) -> tuple[Tensor, tuple[Attention, Attention]]:
        """x (B, N0 + N1, D); keep: keypoints of each view that are keys; attention: that to share.

        Returns x after the residual update, and the attention used: with queries of view 0, and of view 1.
        """
        def project(layer: nn.Linear) -> tuple[Tensor, ...]:
            """(B, heads, N_v, d) of each view."""
            return views.split(layer(narrowed).unflatten(2, (N_HEADS, -1)).transpose(1, 2), dim=2)

        narrowed = narrow(x)
        sources = (1, 0) if cross else (0, 1)
        if self.shares:
            values, merge = project(self.proj), self.merge
        else:
            queries, keys, values = map(project, self.attn["proj"])
            merge = self.attn["merge"]
            memory = (None, None) if attention is None else tuple(a.stored for a in attention)
            attention = tuple(Attention(queries[v], keys[source], keep[source], self.is_shared, memory[v])
                              for v, source in enumerate(sources))
        message = torch.cat([attention[v].messages(values[source]) for v, source in enumerate(sources)], dim=2)
        message = merge(message.transpose(1, 2).flatten(2))
        return x + self.mlp(torch.cat([narrowed, message], dim=-1), views), attention
