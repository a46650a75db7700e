"""The networks of docs/method.md once more, without regard to speed; nets/ is timed against it, and tested by it.

It shares nothing with nets/ but the names of the weights: (B, C, N) tensors and 1x1 convolutions, each view by itself,
attention matrices written out, Sinkhorn unrolled for autograd, EIMP's assignments and pooling sample by sample.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "lrelu": lambda x: F.leaky_relu(x, 0.1)}
HEADS = 4


class Straightforward:
    """A network as a function of its state dict.

    kind: gm, imp or eimp. state: copied; its parameters get gradients in `parameters`, and running statistics are
    updated in `state` when training. n_dropped: by pooling, in all runs so far.
    """

    def __init__(self, kind: str, state: dict, norm_fn: str | None = "in", ac_fn="relu", with_sinkhorn=True,
                 n_min_tokens=256, training=False):
        self.kind, self.norm_fn, self.with_sinkhorn = kind, norm_fn, with_sinkhorn
        self.activation = ACTIVATIONS[ac_fn]
        self.n_min_tokens, self.training = n_min_tokens, training
        self.state = {name: value.detach().clone() for name, value in state.items()}
        self.parameters = {name: value.requires_grad_() for name, value in self.state.items()
                           if value.is_floating_point() and "running" not in name}
        self.n_dropped = 0
        self.n_layers = sum(name.startswith("final_proj") and name.endswith("weight") for name in state)

    def conv(self, name: str, x: Tensor) -> Tensor:
        return F.conv1d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def mlp(self, name: str, n_linear: int, views: list[Tensor]) -> list[Tensor]:
        """views: list of (B, C, N_v); normalised by view and sample (in), by view (bn), or together (bn of IMP)."""
        index = 0
        for i in range(n_linear):
            views = [self.conv(f"{name}.{index}", x) for x in views]
            index += 1
            if i == n_linear - 1:
                return views
            if self.norm_fn == "in":
                views = [F.instance_norm(x, eps=1e-3) for x in views]
                index += 1
            elif self.norm_fn == "bn":
                s, norm = self.state, f"{name}.{index}"
                batches = [torch.cat(views, dim=2)] if self.kind == "imp" else views
                batches = [F.batch_norm(x, s[f"{norm}.running_mean"], s[f"{norm}.running_var"], s[f"{norm}.weight"],
                                        s[f"{norm}.bias"], self.training, eps=1e-3) for x in batches]
                views = torch.cat(batches, dim=2).split([x.shape[2] for x in views], dim=2)
                index += 1
            views = [self.activation(x) for x in views]
            index += 1

    def encode(self, data: dict) -> list[Tensor]:
        """Descriptors of both views with the encoded keypoints added, (B, D, N)."""
        views = []
        for v in "01":
            keypoints = torch.cat([data[f"norm_keypoints{v}"].transpose(1, 2), data[f"scores{v}"].unsqueeze(1)], dim=1)
            views.append(data[f"descriptors{v}"].transpose(1, 2) + self.mlp("kenc.encoder", 5, [keypoints])[0])
        return views

    def split_heads(self, x: Tensor) -> Tensor:
        return x.view(len(x), x.shape[1] // HEADS, HEADS, x.shape[2])  # channel c is component c // 4 of head c % 4

    def attention(self, name: str, x: Tensor, source: Tensor, keep: list[Tensor] | None) -> Tensor:
        """softmax(Q K^T / sqrt(D / 4)), (B, 4, N, M); keep: indices of the keys in use in each sample, None for all."""
        q, k = (self.split_heads(self.conv(f"{name}.proj.{i}", y)) for i, y in enumerate((x, source)))
        logits = torch.einsum("bdhn,bdhm->bhnm", q, k) / (x.shape[1] / HEADS) ** 0.5
        if keep is not None:
            dropped = torch.ones(len(x), 1, 1, source.shape[2], dtype=torch.bool, device=x.device)
            for sample, rows in zip(dropped, keep):
                sample[..., rows] = False
            logits = logits.masked_fill(dropped, torch.finfo(logits.dtype).min)
        return logits.softmax(dim=-1)

    def shares(self, t: int) -> bool:
        period = ["own"] * 4 + ["own", "own", "share", "share"] * self.n_layers
        return self.kind != "gm" and period[2 * t] == "share"

    def iteration(self, t: int, x0: Tensor, x1: Tensor, matrices: dict, keep0=None, keep1=None) -> tuple:
        """One self layer and one cross layer. matrices: {self, cross: (of view 0, of view 1)}, changed in place."""
        for i, kind in ((2 * t, "self"), (2 * t + 1, "cross")):
            name = f"gnn.layers.{i}"
            sources = (x0, x1) if kind == "self" else (x1, x0)
            keeps = (keep0, keep1) if kind == "self" else (keep1, keep0)
            if self.shares(t):
                value, merge = f"{name}.proj", f"{name}.merge"
            else:
                matrices[kind] = [self.attention(f"{name}.attn", x, source, keep)
                                  for x, source, keep in zip((x0, x1), sources, keeps)]
                value, merge = f"{name}.attn.proj.2", f"{name}.attn.merge"
            inputs = []
            for x, source, matrix in zip((x0, x1), sources, matrices[kind]):
                message = torch.einsum("bhnm,bdhm->bdhn", matrix, self.split_heads(self.conv(value, source)))
                inputs.append(torch.cat([x, self.conv(merge, message.reshape(x.shape))], dim=1))
            residuals = self.mlp(f"{name}.mlp", 2, inputs)
            x0, x1 = x0 + residuals[0], x1 + residuals[1]
        return x0, x1

    def assignment(self, t: int, x0: Tensor, x1: Tensor) -> Tensor:
        """(B, n0+1, n1+1)."""
        projected0, projected1 = (self.conv(f"final_proj.{t}", x) for x in (x0, x1))
        scores = torch.einsum("bdn,bdm->bnm", projected0, projected1) / x0.shape[1] ** 0.5
        return assignment_of_scores(scores, self.state["bin_score"], self.with_sinkhorn)

    def run(self, data: dict, pool_threshold=0.1, n_layers: int | None = None, last_only=False) -> list:
        """For each iteration a list over the samples of (assignment, keep0, keep1): of the kept keypoints alone.

        last_only: leave out the assignments, and the entries, that neither the result nor pooling needs.
        """
        n_layers = n_layers or self.n_layers
        x0, x1 = self.encode(data)
        samples = range(len(x0))
        matrices, result = {}, []
        keep0, keep1 = ([torch.arange(x.shape[2], device=x.device) for _ in samples] if self.kind == "eimp" else None
                        for x in (x0, x1))
        for t in range(n_layers):
            x0, x1 = self.iteration(t, x0, x1, matrices, keep0, keep1)
            is_last = t == n_layers - 1
            pools = self.kind == "eimp" and t >= 3 and t % 2 == 1 and not is_last
            if last_only and not pools and not is_last:
                continue
            if self.kind != "eimp":
                result.append([(p, None, None) for p in self.assignment(t, x0, x1)])
                continue
            kept = [(self.assignment(t, x0[b:b + 1, :, keep0[b]], x1[b:b + 1, :, keep1[b]])[0], keep0[b], keep1[b])
                    for b in samples]
            if is_last or not last_only:
                result.append(kept)
            if pools:
                masses = [matrices["self"][0], matrices["cross"][1], matrices["self"][1], matrices["cross"][0]]
                masses = [m.sum(dim=(1, 2)) / m.sum(dim=(1, 2, 3)).unsqueeze(1) for m in masses]
                keep0 = [self.pool(p, keep, masses[0][b], masses[1][b], pool_threshold)
                         for b, (p, keep, _) in enumerate(kept)]
                keep1 = [self.pool(p.T, keep, masses[2][b], masses[3][b], pool_threshold)
                         for b, (p, _, keep) in enumerate(kept)]
        if self.kind == "eimp":
            self.n_dropped += sum(x.shape[2] - len(keep) for x, keeps in ((x0, keep0), (x1, keep1)) for keep in keeps)
        return result

    def pool(self, p: Tensor, keep: Tensor, mass_self: Tensor, mass_cross: Tensor, threshold: float) -> Tensor:
        """The indices among `keep` that stay. p: assignment of the kept; masses: of all keypoints."""
        if len(keep) <= self.n_min_tokens:
            return keep
        matched = p[:-1, :-1].sum(dim=1) >= threshold
        if not matched.any():
            return keep
        stays = matched.clone()
        for mass in (mass_self[keep], mass_cross[keep]):
            stays |= mass >= mass[matched].median()
        return keep[stays]

    def loss(self, data: dict) -> Tensor:
        """The matching loss where every sample has true matches and others in both views.

        data["matching_mask"] (B, N0+1, N1+1), without padding.
        """
        total = 0.0
        for samples in self.run(data):
            for (p, keep0, keep1), mask in zip(samples, data["matching_mask"]):
                if keep0 is not None:
                    kept0, kept1 = (torch.cat([keep, keep.new_tensor([n - 1])])
                                    for keep, n in ((keep0, len(mask)), (keep1, mask.shape[1])))
                    mask = mask[kept0][:, kept1].clone()
                    # whose partner was dropped goes to the dustbin
                    mask[:-1, -1] = 1 - mask[:-1, :-1].sum(dim=1)
                    mask[-1, :-1] = 1 - mask[:-1, :-1].sum(dim=0)
                log, mask = torch.log(p + 1e-8), mask > 0
                for part, weight in ((log[:-1, :-1][mask[:-1, :-1]], 1), (log[:-1, -1][mask[:-1, -1]], 0.5),
                                     (log[-1, :-1][mask[-1, :-1]], 0.5)):
                    if len(part):
                        total = total - weight * part.mean() / len(samples)
        return total / self.n_layers


def assignment_of_scores(scores: Tensor, bin_score: Tensor, with_sinkhorn=True) -> Tensor:
    """Dustbins, then Sinkhorn or dual softmax: scores (B, n0, n1) -> (B, n0+1, n1+1)."""
    batch, n0, n1 = scores.shape
    scores = torch.cat([scores, bin_score.expand(batch, n0, 1)], dim=2)
    scores = torch.cat([scores, bin_score.expand(batch, 1, n1 + 1)], dim=1)
    if not with_sinkhorn:
        return scores.softmax(dim=2) * scores.softmax(dim=1)
    p = scores.softmax(dim=-1)
    r, c = torch.ones(batch, n0 + 1, 1).to(p), torch.ones(batch, n1 + 1, 1).to(p)
    r[:, -1], c[:, -1] = n0 + 1, n1 + 1
    return sinkhorn(p, r, c)


def sinkhorn(p: Tensor, r: Tensor, c: Tensor, iterations=20) -> Tensor:
    """p (B, m, n), r (B, m, 1), c (B, n, 1) -> p * u * v^T."""
    u, v = torch.ones_like(r), torch.ones_like(c)
    for _ in range(iterations):
        u = r / (p @ v + 1e-8)
        v = c / (p.transpose(1, 2) @ u + 1e-8)
    return p * u * v.transpose(1, 2)
