"""SuperPoint: keypoints and descriptors of an image (DeTone, Malisiewicz, Rabinovich, CVPRW 2018)."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CELL = 8
DESCRIPTOR_DIM = 256


def _max_pool(x: Tensor, radius: int) -> Tensor:
    return F.max_pool2d(x, kernel_size=2 * radius + 1, stride=1, padding=radius)


def suppress_non_maxima(scores: Tensor, radius: int) -> Tensor:
    """Scores (B, H, W), zero but at local maxima; two rounds re-admit maxima outside the suppressed area."""
    zeros = torch.zeros_like(scores)
    is_maximum = scores == _max_pool(scores, radius)
    for _ in range(2):
        suppressed = _max_pool(is_maximum.to(scores.dtype), radius) > 0
        rest = torch.where(suppressed, zeros, scores)
        is_maximum = is_maximum | ((rest == _max_pool(rest, radius)) & ~suppressed)
    return torch.where(is_maximum, scores, zeros)


def sample_descriptors(coarse: Tensor, keypoints: Tensor, align_corners: bool = True) -> Tensor:
    """Bilinear samples of a descriptor map (D, H/8, W/8) at keypoints (N, 2) in pixels: (N, D), unit length.

    align_corners: as SuperPoint is defined. Without, as some versions of torch made it of the published code, samples
    are off by 0 pixels at the centre of the image, up to 4 at its border.
    """
    size = torch.tensor([coarse.shape[2], coarse.shape[1]], dtype=keypoints.dtype, device=keypoints.device)
    grid = (keypoints - CELL / 2 + 0.5) / (size * CELL - CELL / 2 - 0.5) * 2 - 1
    sampled = F.grid_sample(coarse[None], grid[None, None], mode="bilinear", align_corners=align_corners)
    return F.normalize(sampled[0, :, 0].T, dim=1)


class SuperPoint(nn.Module):
    """Grayscale images (B, 1, H, W) in [0, 1] -> lists over the batch of keypoints, scores and descriptors.

    max_keypoints: the strongest so many, in order of descending score; -1 keeps all, in raster order.
    align_corners: see `sample_descriptors`.
    """

    def __init__(self, nms_radius=4, keypoint_threshold=0.0025, max_keypoints=-1, remove_borders=4,
                 align_corners=True):
        super().__init__()
        self.nms_radius = nms_radius
        self.keypoint_threshold = keypoint_threshold
        self.max_keypoints = max_keypoints
        self.remove_borders = remove_borders
        self.align_corners = align_corners
        channels = {"1a": (1, 64), "1b": (64, 64), "2a": (64, 64), "2b": (64, 64), "3a": (64, 128), "3b": (128, 128),
                    "4a": (128, 128), "4b": (128, 128), "Pa": (128, 256), "Da": (128, 256)}
        for name, (c_in, c_out) in channels.items():
            setattr(self, f"conv{name}", nn.Conv2d(c_in, c_out, kernel_size=3, padding=1))
        self.convPb = nn.Conv2d(256, CELL * CELL + 1, kernel_size=1)
        self.convDb = nn.Conv2d(256, DESCRIPTOR_DIM, kernel_size=1)

    def dense(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image (B, 1, H, W) -> scores (B, 8*(H//8), 8*(W//8)) and descriptor map (B, 256, H//8, W//8), unit length."""
        x = image
        for level in "1234":
            x = F.relu(getattr(self, f"conv{level}a")(x))
            x = F.relu(getattr(self, f"conv{level}b")(x))
            if level != "4":
                x = F.max_pool2d(x, kernel_size=2, stride=2)
        cells = self.convPb(F.relu(self.convPa(x))).softmax(dim=1)[:, :-1]
        descriptors = self.convDb(F.relu(self.convDa(x)))
        return F.pixel_shuffle(cells, CELL).squeeze(1), F.normalize(descriptors, dim=1)

    def forward(self, image: Tensor) -> dict[str, list[Tensor]]:
        """Lists, one entry an image: keypoints (N, 2) x, y in pixels, scores (N,), descriptors (N, 256).

        An image without room for a cell of 8 x 8 pixels has no keypoints.
        """
        if min(image.shape[2:]) < CELL:
            none = {"keypoints": (0, 2), "scores": (0,), "descriptors": (0, DESCRIPTOR_DIM)}
            return {name: [image.new_zeros(shape) for _ in image] for name, shape in none.items()}
        scores, descriptors = self.dense(image)
        scores = suppress_non_maxima(scores, self.nms_radius)
        border = self.remove_borders
        height, width = scores.shape[1:]
        out = {"keypoints": [], "scores": [], "descriptors": []}
        for score_map, coarse in zip(scores, descriptors):
            y, x = (score_map > self.keypoint_threshold).nonzero(as_tuple=True)
            inside = (x >= border) & (x < width - border) & (y >= border) & (y < height - border)
            y, x = y[inside], x[inside]
            found = score_map[y, x]
            if 0 <= self.max_keypoints:
                order = found.argsort(descending=True, stable=True)[:self.max_keypoints]
                y, x, found = y[order], x[order], found[order]
            keypoints = torch.stack([x, y], dim=1).to(image.dtype)
            out["keypoints"].append(keypoints)
            out["scores"].append(found)
            out["descriptors"].append(sample_descriptors(coarse, keypoints, self.align_corners))
        return out
