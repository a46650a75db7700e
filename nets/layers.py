"""Building blocks of the matchers: pointwise MLP, keypoint encoder, attention, propagation layers.

Everything works on (B, N, C) tensors, keypoints before channels. The two views of a pair lie one after the other in
one tensor, (B, N0 + N1, C), so that what looks at each keypoint alone is one matrix product for both. The weights
keep the shapes (out, in, 1) of the 1x1 convolutions of published checkpoints.
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


class Views:
    """How the keypoints of a batch lie in (B, N, C): those of one view after those of the other.

    sizes: number of keypoints of each view; masks: (B, N_v) or None each, True = real keypoint, False = padding;
    together: whether batch statistics are of all views at once, instead of one view after the other.
    """

    def __init__(self, sizes: list[int], masks: list[Tensor | None], together: bool = False):
        self.sizes, self.masks, self.together = sizes, masks, together
        self.slices = [slice(sum(sizes[:v]), sum(sizes[:v + 1])) for v in range(len(sizes))]
        self._weights = None

    def split(self, x: Tensor, dim: int = 1) -> tuple[Tensor, ...]:
        """(B, N, ...) -> (B, N_v, ...) of each view; dim: that of the keypoints."""
        return x.split(self.sizes, dim)

    def weights(self, x: Tensor) -> list[Tensor]:
        """What makes the mean over each view's real keypoints a matrix product: (B, 1, N_v), 0 where none is real."""
        if self._weights is None or self._weights[0].dtype != x.dtype:
            self._weights = []
            for n, mask in zip(self.sizes, self.masks):
                real = x.new_ones(len(x), 1, n) if mask is None else mask.unsqueeze(1).to(x.dtype)
                self._weights.append(real / real.sum(dim=2, keepdim=True).clamp(min=1))
        return self._weights

    def batches(self, x: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """What batch statistics are taken of: parts (B, N_v, C) of x (B, N, C), and which of each are real keypoints,
        (B, N_v), or None if all are."""
        if not self.together:
            return list(zip(self.split(x), self.masks))
        if all(mask is None for mask in self.masks):
            return [(x, None)]
        return [(x, torch.cat([x.new_ones(len(x), n, dtype=torch.bool) if mask is None else mask
                               for n, mask in zip(self.sizes, self.masks)], dim=1))]


class Linear(nn.Conv1d):
    """A 1x1 convolution, applied to (B, N, C_in) -> (B, N, C_out)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=1)

    @property
    def matrix(self) -> Tensor:
        """(C_out, C_in)."""
        return self.weight.squeeze(-1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix, self.bias)


class _Standardize(torch.autograd.Function):
    """Each channel of each view to mean 0 and variance 1 over its real keypoints; padding becomes 0.

    Most sums over keypoints are matrix products, which are several times faster than reductions over that axis. The
    mean is not: its rounding error would be the same for all keypoints, and add up in the gradients.
    """

    @staticmethod
    def forward(ctx, x: Tensor, views: Views) -> Tensor:
        y = torch.empty_like(x)
        scales = []
        for rows, weight, mask in zip(views.slices, views.weights(x), views.masks):
            of_view = x[:, rows]
            if mask is None:
                mean = of_view.sum(dim=1, keepdim=True) / max(of_view.shape[1], 1)
            else:
                mean = (of_view * weight.transpose(1, 2)).sum(dim=1, keepdim=True)
            part = torch.sub(of_view, mean, out=y[:, rows])
            scales.append(torch.rsqrt(torch.bmm(weight, part.square()) + NORM_EPS))
            part.mul_(scales[-1])
            if mask is not None:
                part.mul_(mask.unsqueeze(-1))
        ctx.views = views
        ctx.save_for_backward(y, *scales)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        y, *scales = ctx.saved_tensors
        grad_x = torch.empty_like(grad)
        views = ctx.views
        for rows, weight, mask, scale in zip(views.slices, views.weights(grad), views.masks, scales):
            g, z = grad[:, rows], y[:, rows]
            part = torch.sub(g, torch.bmm(weight, g), out=grad_x[:, rows])
            part.addcmul_(z, torch.bmm(weight, g * z), value=-1).mul_(scale)
            if mask is not None:
                part.mul_(mask.unsqueeze(-1))
        return grad_x, None


class InstanceNorm(nn.Module):
    """Each channel of each view to mean 0 and variance 1 over its real keypoints; no parameters."""

    def forward(self, x: Tensor, views: Views) -> Tensor:
        """x (B, N, C) -> (B, N, C), float32 or wider."""
        if x.dtype in (torch.float16, torch.bfloat16):
            x = x.float()
        return _Standardize.apply(x, views)


def _batch_norm(norm: nn.Module, x: Tensor, views: Views) -> Tensor:
    """BatchNorm over the keypoints of all samples: one update of the running statistics, or one for each view."""
    if not norm.training:
        return norm(x.flatten(0, 1)).view_as(x)
    parts = []
    for part, mask in views.batches(x):
        if mask is None:
            parts.append(norm(part.flatten(0, 1)).view_as(part))
        else:
            y = norm(part[mask])
            parts.append(torch.zeros_like(part, dtype=y.dtype).masked_scatter(mask.unsqueeze(-1), y))
    return torch.cat(parts, dim=1)


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

    def forward(self, x: Tensor, views: Views, start: int = 0) -> Tensor:
        """x (B, N, C_in) -> (B, N, C_out), by the modules from `start` on."""
        for module in list(self)[start:]:
            if isinstance(module, InstanceNorm):
                x = module(x, views)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                x = _batch_norm(module, x, views)
            else:
                x = module(x)
        return x


class KeypointEncoder(nn.Module):
    """Position and score of a keypoint -> a vector to add to its descriptor."""

    def __init__(self, dim: int, norm_fn: str | None, ac_fn: str):
        super().__init__()
        self.encoder = MLP([3, 32, 64, 128, 256, dim], norm_fn, ac_fn)

    def forward(self, norm_keypoints: Tensor, scores: Tensor, mask: Tensor | None) -> Tensor:
        """norm_keypoints (B, N, 2), scores (B, N), mask (B, N) or None -> (B, N, D)."""
        view = Views([scores.shape[1]], [mask])
        return self.encoder(torch.cat([norm_keypoints, scores.unsqueeze(-1)], dim=-1), view)


class Keys:
    """Which keypoints of a view are keys: those that keep (B, N) says, or all where it is None.

    rows (B, M) or None: on the CPU, keys and values are gathered from these rows, so that what was dropped costs
    nothing; mask (B, M) or None: which of the rows count, as the samples of a batch differ in how many keys they have.
    """

    def __init__(self, keep: Tensor | None):
        self.keep = self.mask = keep
        self.rows = None
        if keep is not None and keep.device.type == "cpu":
            counts = keep.sum(dim=1)
            most = int(counts.max())
            if most < keep.shape[1]:
                self.rows = keep.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
                self.mask = keep.gather(1, self.rows)
            if bool((counts == most).all()):
                self.mask = None

    def gather(self, x: Tensor) -> Tensor:
        """(B, heads, N, d) -> (B, heads, M, d)."""
        if self.rows is None:
            return x
        tokens = x.transpose(1, 2).flatten(2)
        rows = self.rows.unsqueeze(-1).expand(-1, -1, tokens.shape[2])
        return tokens.gather(1, rows).unflatten(2, (N_HEADS, -1)).transpose(1, 2)

    def scatter(self, x: Tensor) -> Tensor:
        """(B, M) -> (B, N), 0 where there is no key."""
        return x if self.rows is None else x.new_zeros(self.keep.shape).scatter(1, self.rows, x)

    def select(self, rows: Tensor) -> "Keys":
        """Of the keypoints `rows`, int64 indices (n,), alone."""
        return Keys(None if self.keep is None else self.keep[:, rows])


def _softmax_(logits: Tensor) -> Tensor:
    """Over the last dimension; in place on the CPU, where a new matrix costs as much as the softmax."""
    return torch.softmax(logits, dim=-1, out=logits if logits.device.type == "cpu" else None)


class AttentionMatrix:
    """softmax(Q K^T / sqrt(d)) of one direction. Another layer may use the same matrix with values of its own.

    queries (B, heads, N, d); keys (B, heads, M, d) of all keypoints, of which `use` says which are used: where there
    is none, messages are zero. What is kept is queries and keys; the matrix itself only where another layer will use
    it (`is_shared`), on the CPU and up to MAX_STORED entries: elsewhere it takes less time to compute it again than to
    store it. memory: the stored matrix of an earlier layer, to be overwritten.
    """

    MAX_STORED = 2 ** 22

    def __init__(self, queries: Tensor, keys: Tensor, use: Keys, is_shared: bool = False,
                 memory: Tensor | None = None):
        self.queries, self.all_keys, self.use = queries, keys, use
        self.keys = use.gather(keys)
        self.matrix = None
        size = queries.shape[:-1].numel() * self.keys.shape[2]
        if (is_shared and queries.device.type == "cpu" and queries.dtype in (torch.float32, torch.float64)
                and 0 < size <= self.MAX_STORED):
            self.matrix = self._compute(memory)

    def _compute(self, memory: Tensor | None) -> Tensor:
        """(B, heads, N, M); with gradients, or else in `memory` if it has that shape."""
        queries, keys, bias = self._scaled_queries(), self.keys.transpose(2, 3), self._bias()
        if torch.is_grad_enabled():
            logits = queries @ keys
            return (logits if bias is None else logits + bias).softmax(dim=-1)
        shape = (*queries.shape[:-1], keys.shape[3])
        if memory is None or memory.shape != shape or memory.dtype != queries.dtype:
            memory = queries.new_empty(shape)
        logits = torch.matmul(queries, keys, out=memory)
        if bias is not None:
            logits += bias
        return _softmax_(logits)

    def _scaled_queries(self) -> Tensor:
        return self.queries * self.queries.shape[-1] ** -0.5

    def _bias(self) -> Tensor | None:
        mask = self.use.mask
        if mask is None:
            return None
        lowest = torch.finfo(self.queries.dtype).min
        bias = torch.zeros(mask.shape, dtype=self.queries.dtype, device=self.queries.device)
        # without any key all are let in, as in half precision lowest logits alone are -inf and give NaN
        masked = ~mask & mask.any(dim=1, keepdim=True)
        return bias.masked_fill(masked, lowest)[:, None, None, :]

    def __matmul__(self, values: Tensor) -> Tensor:
        """values (B, heads, M, d) of all keypoints that keys were given of -> messages (B, heads, N, d)."""
        if self.keys.shape[2] == 0:
            return torch.zeros_like(self.queries)
        values = self.use.gather(values)
        if self.matrix is None:
            messages = F.scaled_dot_product_attention(self.queries, self.keys, values, attn_mask=self._bias())
        else:
            messages = self.matrix @ values
        if self.use.mask is None:
            return messages
        return messages * self.use.mask.any(dim=1).view(-1, 1, 1, 1)

    @torch.no_grad()
    def received_mass(self, query_mask: Tensor | None) -> Tensor:
        """Attention each keypoint receives, summed over heads and real queries (query_mask (B, N)): (B, M), sum 1."""
        batch, _, n, _ = self.queries.shape
        dtype = torch.promote_types(self.queries.dtype, torch.float32)
        ones = torch.ones(batch, 1, n, dtype=dtype, device=self.queries.device)
        if query_mask is not None:
            ones = query_mask.unsqueeze(1).to(dtype)
        if self.matrix is not None:
            of_heads = self.matrix.unbind(dim=1)
        else:
            queries, keys, bias = self._scaled_queries(), self.keys.transpose(2, 3), self._bias()
            logits = ((queries[:, head] @ keys[:, head]).to(dtype) for head in range(N_HEADS))
            of_heads = (_softmax_(x if bias is None else x + bias[:, 0]) for x in logits)
        mass = self.use.scatter(sum(torch.bmm(ones, matrix).squeeze(1) for matrix in of_heads))
        return mass / mass.sum(dim=-1, keepdim=True)

    def select(self, queries: Tensor, keys: Tensor) -> "AttentionMatrix":
        """The matrix between some of its queries and some of its keys: int64 indices (n,), (m,)."""
        return AttentionMatrix(self.queries[:, :, queries], self.all_keys[:, :, keys], self.use.select(keys))


def _head_major(weight: Tensor) -> Tensor:
    """Reorder the first dimension so that each head's channels lie together: channel c belongs to head c mod 4."""
    return weight.view(-1, N_HEADS, *weight.shape[1:]).transpose(0, 1).reshape(weight.shape)


def _heads(x: Tensor, n: int) -> Tensor:
    """(B, N, n D) -> (n, B, heads, N, D / heads)."""
    return x.unflatten(2, (n, N_HEADS, -1)).permute(2, 0, 3, 1, 4)


class _AttentionLayer(nn.Module):
    """What layers that compute an attention matrix and layers that share one have in common."""

    def __init__(self):
        super().__init__()
        self._kept = None

    def _lay_out(self, projections, merge: Linear) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The weights in the order and number in which `forward` multiplies with them.

        Weight and bias of all projections in one, with the channels of each head together; weight and bias of the
        MLP's first layer, its part for the message multiplied with the output projection `merge`.
        """
        first = self.mlp[0]
        of_x, of_message = first.matrix.split(merge.out_channels, dim=1)
        with torch.autocast(of_x.device.type, enabled=False):
            merged = of_message @ _head_major(merge.matrix.T).T
            return (torch.cat([_head_major(linear.matrix) for linear in projections]),
                    torch.cat([_head_major(linear.bias) for linear in projections]),
                    torch.cat([of_x, merged], dim=1), first.bias + of_message @ merge.bias)

    def _weights(self, projections, merge: Linear) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `_lay_out`; where no gradients are wanted only once, and again after a parameter has changed.

        A change is told by the parameters' place in memory and version. Writing through `.data` leaves no trace: call
        `eval()` after it, which starts anew.
        """
        parameters = [p for linear in (*projections, merge, self.mlp[0]) for p in (linear.weight, linear.bias)]
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or any(p.is_inference() for p in parameters):
            return self._lay_out(projections, merge)
        stamps = [(p.data_ptr(), p._version) for p in parameters]
        if self._kept is None or self._kept[0] != stamps:
            # with the parameters themselves, so that no others can come to lie in the same place
            self._kept = stamps, [p.detach() for p in parameters], self._lay_out(projections, merge)
        return self._kept[2]

    def train(self, mode: bool = True):
        self._kept = None
        return super().train(mode)

    def _update(self, x: Tensor, messages: list[Tensor], weight: Tensor, bias: Tensor, views: Views) -> Tensor:
        """x + MLP([x, merge(messages)]); messages (B, heads, N_v, d) of each view, the rest as from `_weights`."""
        message = torch.cat([m.transpose(1, 2) for m in messages], dim=1).flatten(2)
        hidden = F.linear(torch.cat([x, message], dim=-1), weight, bias)
        return x + self.mlp(hidden, views, start=1)


class Attention(nn.Module):
    """Projections of a layer that computes its own attention matrix."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj = nn.ModuleList([Linear(dim, dim) for _ in range(3)])  # query, key, value
        self.merge = Linear(dim, dim)


class OwnAttentionLayer(_AttentionLayer):
    """A self- or cross-attention layer; is_shared: whether another layer will use its attention matrices."""

    def __init__(self, dim: int, norm_fn: str | None, ac_fn: str, is_shared: bool):
        super().__init__()
        self.is_shared = is_shared
        self.attn = Attention(dim)
        self.mlp = MLP([2 * dim, 2 * dim, dim], norm_fn, ac_fn)

    def forward(self, x: Tensor, views: Views, cross: bool, use: tuple[Keys, Keys], earlier):
        """x (B, N0 + N1, D); use: which keypoints of view 0 and of view 1 are keys; earlier: the two matrices of the
        layer of the same kind before, which are not needed any more, or None.

        Returns x after the residual update, and the two attention matrices (queries of view 0, of view 1).
        """
        *of_heads, weight, bias = self._weights(self.attn.proj, self.attn.merge)
        (q0, q1), (k0, k1), (v0, v1) = [views.split(y, dim=2) for y in _heads(F.linear(x, *of_heads), 3)]
        use0, use1 = use
        if cross:
            k0, v0, use0, k1, v1, use1 = k1, v1, use1, k0, v0, use0
        memory0, memory1 = (None, None) if earlier is None else (matrix.matrix for matrix in earlier)
        attention = (AttentionMatrix(q0, k0, use0, self.is_shared, memory0),
                     AttentionMatrix(q1, k1, use1, self.is_shared, memory1))
        return self._update(x, [attention[0] @ v0, attention[1] @ v1], weight, bias, views), attention


class SharedAttentionLayer(_AttentionLayer):
    """A layer that passes values of its own through attention matrices of an earlier layer of the same kind."""

    def __init__(self, dim: int, norm_fn: str | None, ac_fn: str):
        super().__init__()
        self.proj = Linear(dim, dim)
        self.merge = Linear(dim, dim)
        self.mlp = MLP([2 * dim, 2 * dim, dim], norm_fn, ac_fn)

    def forward(self, x: Tensor, views: Views, cross: bool, attention) -> Tensor:
        """As `OwnAttentionLayer.forward`, with the two matrices given. Returns x."""
        *of_heads, weight, bias = self._weights([self.proj], self.merge)
        (values,) = _heads(F.linear(x, *of_heads), 1)
        v0, v1 = views.split(values, dim=2)
        if cross:
            v0, v1 = v1, v0
        return self._update(x, [attention[0] @ v0, attention[1] @ v1], weight, bias, views)
