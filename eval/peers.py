"""LightGlue (Lindenberger, Sarlin, Pollefeys, ICCV 2023), of kornia, one-shot and as a network that the loop drives."""
import functools
import importlib.util
from collections.abc import Iterator

import torch
from torch import Tensor

from nets.assignment import matches_of_input
from nets.layers import attend, narrow
from tools.features import FEATURE_TYPES
from tools.precision import set_precision
from tools.pretrained import find_pretrained, import_kornia, load_pretrained

# feature type -> kornia's name of it
LIGHTGLUE_FEATURES = {"aliked": "aliked", "disk": "disk", "spp": "superpoint"}
DEPTH_CONFIDENCE, WIDTH_CONFIDENCE = 0.95, 0.99  # of its own exit and pruning, as published


def lightglue_file(feature_type: str) -> str:
    """Name of the file of LightGlue's weights for a feature type."""
    return f"{LIGHTGLUE_FEATURES[feature_type]}_lightglue.pth"


def lightglue_is_installed() -> bool:
    """Whether LightGlue and ALIKED can be had without a download."""
    files = FEATURE_TYPES["aliked"].weights_file, lightglue_file("aliked")
    return importlib.util.find_spec("kornia") is not None and all(map(find_pretrained, files))


def _rename(state: dict) -> dict:
    """Entries of the first files that were published -> kornia's names."""
    renamed = {}
    for name, value in state.items():
        block, _, rest = name.partition(".")
        if block in ("self_attn", "cross_attn"):
            layer, _, rest = rest.partition(".")
            name = f"transformers.{layer}.{block}.{rest}"
        if not name.endswith(".r"):  # a buffer of no use
            renamed[name] = value
    return renamed


def _cross_attention(block, x0: Tensor, x1: Tensor, mask=None) -> tuple[Tensor, Tensor]:
    """What kornia's CrossBlock computes, without mask; on CPUs its own code takes twice as long."""
    narrow0, narrow1 = narrow(x0), narrow(x1)
    qk0, qk1, v0, v1 = (layer(x).unflatten(-1, (block.heads, -1)).transpose(1, 2)
                        for layer in (block.to_qk, block.to_v) for x in (narrow0, narrow1))
    messages = attend(qk0, qk1, v1), attend(qk1, qk0, v0)
    return tuple(x + block.ffn(torch.cat([narrowed, block.to_out(m.transpose(1, 2).flatten(-2))], -1))
                 for x, narrowed, m in zip((x0, x1), (narrow0, narrow1), messages))


def _self_attention(queries: Tensor, keys: Tensor, values: Tensor, mask=None) -> Tensor:
    """What kornia's Attention computes, without mask."""
    return attend(*(narrow(x).contiguous() for x in (queries, keys, values)))


class LightGlue(torch.nn.Module):
    """LightGlue with published weights, in evaluation mode.

    weights: a file, or None (`tools.pretrained`). prunes: whether `iterate` prunes keypoints after each layer, as
    LightGlue does. precision: of its layers; descriptors between them, assignment and confidences are in float32.
    """

    pools = False  # by the rule of EIMP
    has_exit = True  # the states say where LightGlue itself would stop

    def __init__(self, feature_type: str, weights=None, device="cpu", prunes: bool = True,
                 precision: str = "float32"):
        super().__init__()
        kornia, name = import_kornia(), LIGHTGLUE_FEATURES[feature_type]
        options = {"depth_confidence": DEPTH_CONFIDENCE, "width_confidence": WIDTH_CONFIDENCE, "filter_threshold": 0.0}
        self.network = load_pretrained(
            lightglue_file(feature_type), weights, device,
            lambda: kornia.LightGlue(None, input_dim=FEATURE_TYPES[feature_type].dim, **options),
            lambda: kornia.LightGlue(name, **options), _rename)
        self.n_layers, self.prunes = self.network.conf.n_layers, prunes

        if next(self.network.parameters()).device.type == "cpu":
            for layer in self.network.transformers:
                layer.cross_attn.forward = functools.partial(_cross_attention, layer.cross_attn)
                layer.self_attn.inner_attn.forward = _self_attention
        set_precision(self.network.transformers, precision)

    def iterate(self, data: dict, n_layers: int | None = None) -> Iterator["LightGlueState"]:
        """Yield the state after each layer, as `nets.matchers.Matcher.iterate` does; one pair at a time."""
        state = LightGlueState(self.network, data)
        for t in range(n_layers or self.n_layers):
            if t and self.prunes:
                state.prune()
            state.advance()
            yield state

    @torch.no_grad()
    def forward(self, data: dict, n_layers: int | None = None) -> dict:
        """One-shot matching by the first n_layers layers, or all, of one pair."""
        state = LightGlueState(self.network, data)
        for _ in range(n_layers or self.n_layers):
            state.advance()
        matches0, matches1, scores0, scores1 = state.matches(0.0)
        return {"matches0": matches0, "matches1": matches1, "matching_scores0": scores0, "matching_scores1": scores1}

    @torch.no_grad()
    def match_adaptively(self, data: dict) -> dict:
        """Matching with LightGlue's own exit and pruning; `stop` is the number of layers that were run."""
        return self.network({f"image{v}": {"keypoints": inside_image(data, v), "descriptors": data[f"descriptors{v}"],
                                           "image_size": data[f"image_size{v}"]} for v in "01"})


def inside_image(data: dict, view: str) -> Tensor:
    """Keypoints (1, N, 2); kornia refuses those outside of the image, as extractors may round some."""
    return torch.minimum(data[f"keypoints{view}"].clamp(min=0), data[f"image_size{view}"][:, None])


class LightGlueState:
    """Where one pair stands after a layer; like `nets.matchers.MatchingState`."""

    def __init__(self, network, data: dict):
        from kornia.feature.lightglue import normalize_keypoints

        self.network, self.iteration = network, -1
        self.descriptors, self.encodings, self.indices = [], [], []
        for v in "01":
            self.descriptors.append(network.input_proj(data[f"descriptors{v}"]))
            self.encodings.append(network.posenc(normalize_keypoints(inside_image(data, v), data[f"image_size{v}"])))
            self.indices.append(torch.arange(data[f"keypoints{v}"].shape[1], device=self.descriptors[-1].device))
        self.n_inputs = [len(indices) for indices in self.indices]

    @property
    def indices0(self) -> Tensor:
        """(K0,) int64: the input's keypoints that are still there."""
        return self.indices[0]

    @property
    def indices1(self) -> Tensor:
        """(K1,) int64."""
        return self.indices[1]

    def advance(self) -> None:
        """One layer: self-attention, then cross-attention."""
        self.iteration += 1
        self.descriptors = list(self.network.transformers[self.iteration](*self.descriptors, *self.encodings))

    def matches(self, threshold: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """matches0, matches1 (1, N) int64 and their scores, of the input's keypoints; -1 and 0 for removed ones."""
        from kornia.feature.lightglue import filter_matches

        assignment, _ = self.network.log_assignment[self.iteration](*self.descriptors)
        return matches_of_input(filter_matches(assignment, threshold), self.indices, self.n_inputs)

    def confidences(self) -> tuple[Tensor, Tensor]:
        """How sure each keypoint is of its match, (1, K0), (1, K1) in [0, 1]; there are none at the last layer."""
        return self.network.token_confidence[self.iteration](*self.descriptors)

    def is_confident(self) -> bool:
        """Whether LightGlue itself would stop here; removed keypoints count as sure."""
        if self.iteration == self.network.conf.n_layers - 1:
            return True
        return bool(self.network.check_if_stop(*self.confidences(), self.iteration, sum(self.n_inputs)))

    def prune(self) -> None:
        """Remove what is sure to have no match, as LightGlue does."""
        t, log_assignment = self.iteration, self.network.log_assignment[self.iteration]
        rows = []
        for descriptors, confidences in zip(self.descriptors, self.confidences()):
            keep = self.network.get_pruning_mask(confidences, log_assignment.get_matchability(descriptors), t)[0]
            rows.append(keep.nonzero()[:, 0] if keep.any() else torch.arange(len(keep), device=keep.device))
        self.select(*rows)

    def select(self, rows0: Tensor, rows1: Tensor) -> None:
        """Keep only some of the present keypoints of each view: sorted int64 indices (K0,), (K1,)."""
        for v, rows in enumerate((rows0, rows1)):
            self.indices[v] = self.indices[v][rows]
            self.descriptors[v] = self.descriptors[v][:, rows]
            self.encodings[v] = self.encodings[v].index_select(-2, rows)
