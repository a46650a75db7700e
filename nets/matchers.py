"""The matchers GM, IMP and EIMP: features of two views -> matches, one iteration at a time."""
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nets import layout
from nets.assignment import assign, matches_of_input, mutual_matches
from nets.layers import ACTIVATIONS, AttentionLayer, KeypointEncoder, Views, normalize_keypoints
from nets.losses import judge, targets_of, total
from nets.pooling import keep_mask

POOL_THRESHOLD = 0.1  # of training and one-shot evaluation; the iterative loop brings its own


def is_second(t: int) -> bool:
    """Whether iteration t (0-based) is the second of a pair: there IMP shares attention, and EIMP pools after it."""
    return t >= 3 and t % 2 == 1


class MatchingState:
    """The two views of a batch between two iterations; `Matcher.iterate` yields it after each.

    iteration: 0-based number of the iteration just done. x (B, N0 + N1, D): descriptors now.
    mask0/1 (B, N) or None: real keypoints. keep0/1 (B, N) or None: those that pooling has not masked out.
    indices0/1 (N,): which of the input's keypoints the rows are, once some were removed.
    """

    def __init__(self, matcher: "Matcher", x: Tensor, views: Views):
        self.matcher, self.x, self.views = matcher, x, views
        self.iteration = -1
        self.keep0, self.keep1 = views.masks
        self.indices0, self.indices1 = (torch.arange(n, device=x.device) for n in views.sizes)
        self.n_inputs = views.sizes
        self.attention_self = self.attention_cross = self._assignment = None

    @property
    def x0(self) -> Tensor:
        """Descriptors of view 0, (B, N0, D)."""
        return self.views.split(self.x)[0]

    @property
    def x1(self) -> Tensor:
        """Descriptors of view 1, (B, N1, D)."""
        return self.views.split(self.x)[1]

    def advance(self) -> None:
        """One iteration: self-attention, then cross-attention."""
        self.iteration += 1
        self._assignment = None
        layers, keep = self.matcher.gnn.layers[2 * self.iteration:], (self.keep0, self.keep1)
        self.x, self.attention_self = layers[0](self.x, self.views, False, keep, self.attention_self)
        self.x, self.attention_cross = layers[1](self.x, self.views, True, keep, self.attention_cross)

    @property
    def assignment(self) -> Tensor:
        """Assignment of the present keypoints, (B, N0+1, N1+1) with dustbins, at this iteration."""
        if self._assignment is None:
            matcher, proj = self.matcher, self.matcher.final_proj[self.iteration]
            self._assignment = assign(*self.views.split(proj(self.x)), matcher.bin_score, matcher.with_sinkhorn,
                                      matcher.sinkhorn_iterations, self.keep0, self.keep1)
        return self._assignment

    def matches(self, threshold: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """matches0, matches1 (B, N) int64 and their scores, of the input's keypoints; -1 and 0 for removed ones."""
        found = mutual_matches(self.assignment, threshold)
        if self.views.sizes == self.n_inputs:
            return found
        return matches_of_input(found, (self.indices0, self.indices1), self.n_inputs)

    def attention_masses(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Attention received in self- and cross-attention: self0, cross0 (B, N0), self1, cross1 (B, N1), sum 1 each."""
        mask0, mask1 = self.views.masks
        return (self.attention_self[0].received_mass(mask0), self.attention_cross[1].received_mass(mask1),
                self.attention_self[1].received_mass(mask1), self.attention_cross[0].received_mass(mask0))

    def _pool(self, threshold: float, n_min_tokens: int) -> tuple[Tensor, Tensor]:
        """Keypoints of each view to keep, (B, N0), (B, N1) bool."""
        self0, cross0, self1, cross1 = self.attention_masses()
        return (keep_mask(self.assignment, self0, cross0, threshold, n_min_tokens, self.keep0),
                keep_mask(self.assignment.transpose(1, 2), self1, cross1, threshold, n_min_tokens, self.keep1))

    def mask_out(self, threshold: float) -> None:
        """Pool by masking: keypoints that are not kept stay in the tensors, but are no keys and have no scores."""
        if 0 not in self.views.sizes:
            self.keep0, self.keep1 = self._pool(threshold, self.matcher.n_min_tokens)
            self._assignment = None

    @torch.no_grad()
    def remove(self, threshold: float, n_min_tokens: int | None = None) -> None:
        """Pool by removal, which makes the iterations that follow cheaper. One pair at a time (B = 1).

        n_min_tokens: a view with no more keypoints keeps all (None: as the network says).
        """
        if len(self.x) != 1:
            raise ValueError("keypoints can be removed from one pair at a time: the views of a batch differ in number")
        if 0 not in self.views.sizes:
            keeps = self._pool(threshold, self.matcher.n_min_tokens if n_min_tokens is None else n_min_tokens)
            self.select(*(keep[0].nonzero()[:, 0] for keep in keeps))

    def select(self, rows0: Tensor, rows1: Tensor) -> None:
        """Keep only some of the present keypoints of each view: sorted int64 indices (K0,), (K1,)."""
        self.indices0, self.indices1 = self.indices0[rows0], self.indices1[rows1]
        self.x = torch.cat([self.x0[:, rows0], self.x1[:, rows1]], dim=1)
        mask0, mask1 = self.views.masks
        mask0, keep0 = (None if mask is None else mask[:, rows0] for mask in (mask0, self.keep0))
        mask1, keep1 = (None if mask is None else mask[:, rows1] for mask in (mask1, self.keep1))
        self.views = Views((len(rows0), len(rows1)), (mask0, mask1))
        self.keep0, self.keep1, self._assignment = keep0, keep1, None
        self.attention_self = (self.attention_self[0].select(rows0, rows0), self.attention_self[1].select(rows1, rows1))
        self.attention_cross = (self.attention_cross[0].select(rows0, rows1),
                                self.attention_cross[1].select(rows1, rows0))


def _take_published(_, state: dict, prefix: str, *rest) -> None:
    for name in state:
        if name.startswith(prefix):
            state[name] = layout.from_published(name.removeprefix(prefix), state[name])


def _give_published(_, state: dict, prefix: str, metadata) -> None:
    for name in state:
        if name.startswith(prefix):
            state[name] = layout.to_published(name.removeprefix(prefix), state[name])


class Matcher(nn.Module):
    """What GM, IMP and EIMP have in common, which is all but two choices.

    data: descriptors0/1 (B, N, D), scores0/1 (B, N), and norm_keypoints0/1 (B, N, 2), or keypoints0/1 (B, N, 2) in
    pixels with image_size0/1 (B, 2) as (w, h); optionally mask0/1 (B, N) bool, True = real keypoint, False = padding;
    for training also target0/1 (B, N), the true matches as indices (`nets.losses.Targets`), or matching_mask
    (B, N0+1, N1+1), and for the pose loss camera_keypoints0/1 (B, N, 2), in normalised camera coordinates, and has_pose
    (B,).
    """

    shares_attention = False  # whether layers reuse the attention matrix of the iteration before
    pools = False  # whether keypoints are dropped on the way
    views_together = False  # whether batch norm takes statistics of both views at once

    def __init__(self, descriptor_dim=256, n_layers=15, norm_fn="in", ac_fn="relu", with_sinkhorn=True,
                 sinkhorn_iterations=20, match_threshold=0.2, n_min_tokens=256):
        super().__init__()
        if descriptor_dim % layout.N_HEADS:
            raise ValueError(f"descriptor_dim {descriptor_dim} is not a multiple of {layout.N_HEADS}, the number of "
                             "heads")
        if ac_fn not in ACTIVATIONS:
            raise ValueError(f"ac_fn {ac_fn!r}: expected one of {', '.join(ACTIVATIONS)}")
        self.n_layers = n_layers
        self.with_sinkhorn = with_sinkhorn
        self.sinkhorn_iterations = sinkhorn_iterations
        self.match_threshold = match_threshold
        self.n_min_tokens = n_min_tokens
        self.kenc = KeypointEncoder(descriptor_dim, norm_fn, ac_fn)
        shares = [self.shares_attention and is_second(t) for t in range(n_layers + 1)]
        self.gnn = nn.Module()  # named as published; of each iteration the layer of self-attention, then of cross
        self.gnn.layers = nn.ModuleList([
            AttentionLayer(descriptor_dim, norm_fn, ac_fn, self.views_together, shares[t], is_shared=shares[t + 1])
            for t in range(n_layers) for _ in range(2)])
        self.final_proj = nn.ModuleList([nn.Linear(descriptor_dim, descriptor_dim) for _ in range(n_layers)])
        self.bin_score = nn.Parameter(torch.tensor(1.0))
        with torch.no_grad():  # a seed gives the weights that it gave in the published layout
            for name, parameter in self.named_parameters():
                parameter.copy_(layout.from_published(name, parameter.clone()))
        self.register_load_state_dict_pre_hook(_take_published)
        self.register_state_dict_post_hook(_give_published)

    def encode(self, data: dict) -> MatchingState:
        """The state before the first iteration: descriptors plus encoded keypoints."""
        keypoints = [data.get(f"norm_keypoints{v}") for v in "01"]
        if keypoints[0] is None:
            keypoints = [normalize_keypoints(data[f"keypoints{v}"], data[f"image_size{v}"]) for v in "01"]
        views = Views(tuple(x.shape[1] for x in keypoints), (data.get("mask0"), data.get("mask1")))
        descriptors, scores = (torch.cat([data[name + v] for v in "01"], dim=1) for name in ("descriptors", "scores"))
        return MatchingState(self, descriptors + self.kenc(torch.cat(keypoints, dim=1), scores, views), views)

    def iterate(self, data: dict, n_layers: int | None = None, pool_threshold: float | None = None
                ) -> Iterator[MatchingState]:
        """Yield the state after each iteration; the caller may read its matches and pool before the next one.

        n_layers: how many iterations, at most and by default all that the network has. pool_threshold: with one, EIMP
        pools by masking, as in training.
        """
        n_layers = self.n_layers if n_layers is None else n_layers
        if not 1 <= n_layers <= self.n_layers:
            raise ValueError(f"n_layers {n_layers}: the network has {self.n_layers} iterations")
        state = self.encode(data)
        for t in range(n_layers):
            if self.pools and pool_threshold is not None and is_second(t - 1):
                state.mask_out(pool_threshold)
            state.advance()
            yield state

    def forward(self, data: dict, n_layers: int | None = None, **objective) -> dict:
        """One-shot matching: matches0/1 (B, N) int64 and matching_scores0/1 (B, N) of the last iteration.

        With true matches in `data` also what `nets.losses.total` makes of all iterations: loss, its terms and counts.
        objective: options of `nets.losses.judge`.
        """
        targets, judged = targets_of(data), []
        for state in self.iterate(data, n_layers, POOL_THRESHOLD):
            if targets is not None:
                judged.append(judge(state, targets, data, **objective))
        names = ("matches0", "matches1", "matching_scores0", "matching_scores1")
        out = dict(zip(names, state.matches(self.match_threshold)))
        return out if targets is None else {**out, **total(judged)}

    @torch.no_grad()
    def match_all_iterations(self, data: dict, threshold: float = 0.2, pool_threshold: float = POOL_THRESHOLD,
                             n_layers: int | None = None) -> tuple[Tensor, Tensor]:
        """One-shot matching read at every iteration: matches0 (L, B, N0) int64, scores0 (L, B, N0)."""
        found = [state.matches(threshold) for state in self.iterate(data, n_layers, pool_threshold)]
        return torch.stack([matches0 for matches0, *_ in found]), torch.stack([scores0 for _, _, scores0, _ in found])


class GM(Matcher):
    """Every layer computes its own attention."""


class IMP(Matcher):
    """From iteration 3 on, every other iteration shares the attention of the one before."""

    shares_attention = True
    views_together = True


class EIMP(Matcher):
    """IMP that drops keypoints unlikely to be matched."""

    shares_attention = True
    pools = True


MATCHERS = {"gm": GM, "imp": IMP, "dgnns": IMP, "eimp": EIMP, "adagmn": EIMP}


def build_matcher(network: str, **options) -> Matcher:
    """A matcher by its name in configs: gm, imp (or dgnns), eimp (or adagmn). Options as in `Matcher`."""
    if network.lower() not in MATCHERS:
        raise ValueError(f"unknown network {network!r}: known are {', '.join(MATCHERS)}")
    return MATCHERS[network.lower()](**options)
