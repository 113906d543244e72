"""The Inception of FID: the graph that TensorFlow published on 2015-12-05, with the weight file of pytorch-fid and
torch-fidelity.

Szegedy et al., "Rethinking the Inception Architecture", as frozen in `classify_image_graph_def.pb`. It differs from the
later Inception v3: averages exclude the padding, the last block pools by maximum, there are 1008 outputs. Parameters
are named as in the weight file. B images, channels first; the graph's own names are given beside ours.
"""

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uvit_fast.runtime.errors import UserError

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")  # the same bytes
POOL_DIM, SPATIAL_CHANNELS, CLASSES = 2048, 7, 1008


class ConvBN(nn.Module):
    """Convolution, batch norm with running statistics, ReLU."""

    def __init__(self, c_in: int, c_out: int, kernel, stride: int = 1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


Branches = dict[str, list[tuple]]


class Block(nn.Module):
    """Parallel branches of ConvBN, joined along the channels.

    Args:
        branches: name -> its layers as ConvBN arguments; layer i of a branch of several is named `<name>_<i>`.
        pool: what the pooled branch does before its optional `branch_pool` convolution.
    """

    def __init__(self, c_in: int, branches: Branches, pool: str, pool_channels: int = 0):
        super().__init__()
        self.branches, self.pool = [], pool
        for name, layers in branches.items():
            names, c = [], c_in
            for i, (c_out, *rest) in enumerate(layers, 1):
                names.append(name if len(layers) == 1 else f"{name}_{i}")
                self.add_module(names[-1], ConvBN(c, c_out, *rest))
                c = c_out
            self.branches.append(names)
        self.branch_pool = ConvBN(c_in, pool_channels, 1) if pool_channels else None

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for names in self.branches:
            y = x
            for name in names:
                y = self.get_submodule(name)(y)
            outputs.append(y)
        y = _pool(x, self.pool)
        outputs.append(y if self.branch_pool is None else self.branch_pool(y))
        return torch.cat(outputs, 1)


class ForkedBlock(nn.Module):
    """The last two blocks: two of the branches end in a (1, 3) and a (3, 1) convolution side by side."""

    def __init__(self, c_in: int, pool: str):
        super().__init__()
        self.pool = pool
        self.branch1x1 = ConvBN(c_in, 320, 1)
        self.branch3x3_1 = ConvBN(c_in, 384, 1)
        self.branch3x3_2a = ConvBN(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = ConvBN(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = ConvBN(c_in, 448, 1)
        self.branch3x3dbl_2 = ConvBN(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = ConvBN(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = ConvBN(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = ConvBN(c_in, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        forks = [self.branch3x3_2a(a), self.branch3x3_2b(a), self.branch3x3dbl_3a(b), self.branch3x3dbl_3b(b)]
        return torch.cat([self.branch1x1(x), *forks, self.branch_pool(_pool(x, self.pool))], 1)  # (B, 2048, 8, 8)


def _block35(c_in: int, pool_channels: int) -> Block:
    branches: Branches = {
        "branch1x1": [(64, 1)],
        "branch5x5": [(48, 1), (64, 5, 1, 2)],
        "branch3x3dbl": [(64, 1), (96, 3, 1, 1), (96, 3, 1, 1)],
    }
    return Block(c_in, branches, "average", pool_channels)


def _block17(c: int) -> Block:
    row, column = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
    branches: Branches = {
        "branch1x1": [(192, 1)],
        "branch7x7": [(c, 1), (c, *row), (192, *column)],
        "branch7x7dbl": [(c, 1), (c, *column), (c, *row), (c, *column), (192, *row)],
    }
    return Block(768, branches, "average", 192)


class Features(NamedTuple):
    """pool: (B, D) fp32. spatial: (B, S) fp32, row, column, channel with the channel last, as TensorFlow flattens."""

    pool: Tensor
    spatial: Tensor


class Inception(nn.Module):
    """The network; `forward` takes the output of `preprocess`."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvBN(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3)
        self.Mixed_5b = _block35(192, 32)  # mixed
        self.Mixed_5c = _block35(256, 64)  # mixed_1
        self.Mixed_5d = _block35(288, 64)  # mixed_2
        self.Mixed_6a = Block(  # mixed_3
            288, {"branch3x3": [(384, 3, 2)], "branch3x3dbl": [(64, 1), (96, 3, 1, 1), (96, 3, 2)]}, "shrink"
        )
        self.Mixed_6b = _block17(128)  # mixed_4
        self.Mixed_6c = _block17(160)  # mixed_5
        self.Mixed_6d = _block17(160)  # mixed_6
        self.Mixed_6e = _block17(192)  # mixed_7
        branches: Branches = {
            "branch3x3": [(192, 1), (320, 3, 2)],
            "branch7x7x3": [(192, 1), (192, (1, 7), 1, (0, 3)), (192, (7, 1), 1, (3, 0)), (192, 3, 2)],
        }
        self.Mixed_7a = Block(768, branches, "shrink")  # mixed_8
        self.Mixed_7b = ForkedBlock(1280, "average")  # mixed_9
        self.Mixed_7c = ForkedBlock(2048, "maximum")  # mixed_10
        self.fc = nn.Linear(POOL_DIM, CLASSES)

    def forward(self, x: Tensor) -> Features:
        """Map (B, 3, 299, 299) in [-1, 1] to pool3 (B, 2048) and mixed_6/conv's first 7 channels (B, 17 * 17 * 7)."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = _pool(x, "shrink")  # (B, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # (B, 192, 71, 71)
        x = _pool(x, "shrink")  # (B, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (B, 288, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # (B, 768, 17, 17)
        x = self.Mixed_6d(x)  # (B, 768, 17, 17)
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # branch1x1 comes first; (B, 2023)
        x = self.Mixed_7a(self.Mixed_6e(x))  # (B, 1280, 8, 8)
        x = self.Mixed_7c(self.Mixed_7b(x))  # (B, 2048, 8, 8)
        return Features(x.mean((2, 3)), spatial)

    def probabilities(self, pool: Tensor) -> Tensor:
        """Return (B, 1008) from (B, 2048): the softmax of the logits without their bias, as for the Inception score."""
        return torch.softmax(pool @ self.fc.weight.T.to(pool.dtype), 1)


def _pool(x: Tensor, kind: str) -> Tensor:
    if kind == "average":
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    if kind == "maximum":
        return F.max_pool2d(x, 3, 1, 1)
    assert kind == "shrink"
    return F.max_pool2d(x, 3, 2)


def preprocess(images: Tensor, like: str = "tensorflow") -> Tensor:
    """Resize and scale (B, H, W, 3) uint8 to (B, 3, 299, 299) fp32.

    Args:
        like: "tensorflow", as in the graph and in ADM's references: bilinear with the corner of pixel 0 at 0, then
            (x - 128) / 128. "pytorch-fid": bilinear between pixel centres, then 2 x / 255 - 1. FID differs between
            them.
    """
    x = images.permute(0, 3, 1, 2).float()  # (B, 3, H, W)
    if like == "pytorch-fid":
        return F.interpolate(x / 255, (299, 299), mode="bilinear", align_corners=False) * 2 - 1
    assert like == "tensorflow", like
    return (_resize_corner(_resize_corner(x, 299, 2), 299, 3) - 128) / 128


def _resize_corner(x: Tensor, size: int, dim: int) -> Tensor:
    """Resize linearly along one dimension: output i is input i * old / new, the last pixel repeated beyond the edge."""
    old = x.shape[dim]
    position = torch.arange(size, device=x.device, dtype=torch.float32) * (old / size)
    low = position.floor().long().clamp(max=old - 1)
    high = (low + 1).clamp(max=old - 1)
    fraction = (position - low).view([-1 if d == dim else 1 for d in range(x.ndim)])
    first = x.index_select(dim, low)
    return first + (x.index_select(dim, high) - first) * fraction


def load_inception(path: str | Path | None = None, download: bool = False) -> tuple[Inception, str]:
    """Return the network with its published weights, for inference.

    Args:
        path: the weight file; None: among torch.hub's downloads.
        download: if the file is missing, download it through torch.hub; needs internet.

    Returns:
        The network and the SHA-256 of the file.

    Raises:
        UserError: no file, one whose bytes do not match its name or the published ones, or one of another network.
    """
    path = find_weights(download) if path is None else Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such Inception weight file; expected {FILES[0]} or {FILES[1]} ({URL})")
    sha = check_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds; each means the same to the user
        raise UserError(f"{path}: not a PyTorch weight file ({str(error).splitlines()[0]})") from None
    return load_state(state, str(path)), sha


def load_state(state: dict[str, Tensor], source: str) -> Inception:
    """Return the network with the tensors of a weight file; `num_batches_tracked`, unused in inference, may be missing.

    Raises:
        UserError: a tensor is missing, unknown, of the wrong shape, or not finite.
    """
    with torch.device("meta"):
        model = Inception()
    expected = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    if not isinstance(state, dict):
        raise UserError(f"{source}: expected a state dict of the 2015 Inception, got {type(state).__name__}")
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    for kind, names in {"misses": expected.keys() - state, "has unknown": state.keys() - expected}.items():
        if names:
            raise UserError(
                f"{source}: not the 2015 Inception: {kind} {len(names)} tensors, such as {sorted(names)[0]}"
            )
    for name, value in state.items():
        if value.shape != expected[name].shape:
            want, got = tuple(expected[name].shape), tuple(value.shape)
            raise UserError(f"{source}: {name}: expected shape {want}, got {got}")
        if not torch.isfinite(value).all():
            raise UserError(f"{source}: {name}: expected finite weights, got NaN or infinity")
    zero = {name: torch.zeros((), dtype=torch.long) for name in model.state_dict().keys() - state.keys()}
    model.load_state_dict({**{k: v.float() for k, v in state.items()}, **zero}, assign=True)
    return model.eval().requires_grad_(False)


def check_file(path: Path) -> str:
    """Return the SHA-256 of a weight file, compared with the published one, or with the prefix in another name's `-<8
    hex>.pth`.

    Raises:
        UserError: they differ, or the name has no prefix and the bytes are not the published ones.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    sha = digest.hexdigest()
    prefix = re.search(r"-([0-9a-f]{8,64})\.[a-z]+$", path.name)
    expected = SHA256 if path.name in FILES or not prefix else prefix.group(1)
    if not sha.startswith(expected):
        raise UserError(f"{path}: expected SHA-256 {expected}, got {sha}: a broken download or other weights")
    return sha


def find_weights(download: bool = False) -> Path:
    """Return the weight file among torch.hub's downloads, downloaded first if requested."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for name in FILES:
        if (folder / name).is_file():
            return folder / name
    if not download:
        raise UserError(
            f"Inception weights: none of {', '.join(FILES)} in {folder}; name the file (evaluate.inception; "
            "--inception of uvit-fast evaluate, whose --download fetches it); "
            "digits and Fashion-MNIST have digits-fid (evaluate.features; --features)"
        )
    folder.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(URL, str(folder / FILES[0]), hash_prefix=SHA256)
    except (OSError, RuntimeError) as error:
        raise UserError(f"Inception weights: could not download {URL} ({error})") from None
    return folder / FILES[0]
