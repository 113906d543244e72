"""The 2015 Inception: its tensors, its arithmetic against a plain numpy graph, and how weight files are taken.

The published weights are not here: files of the same tensors with random values stand for them.
"""

import hashlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from uvit_fast.evaluation import inception
from uvit_fast.evaluation.inception import Inception, check_file, find_weights, load_inception, load_state, preprocess
from uvit_fast.runtime.errors import UserError

# The graph as the paper's Figures 5 to 7 and `classify_image_graph_def.pb` have it: a branch is a chain of
# (name, channels, kernel height, kernel width), stride 1 and SAME unless the name ends in /2 (stride 2, VALID).
STEM = (
    [("1a_3x3/2", 32, 3, 3), ("2a_3x3/v", 32, 3, 3), ("2b_3x3", 64, 3, 3)],
    [("3b_1x1", 80, 1, 1), ("4a_3x3/v", 192, 3, 3)],
)


def block35(pool):
    return [
        [("1x1", 64, 1, 1)],
        [("5x5_1", 48, 1, 1), ("5x5_2", 64, 5, 5)],
        [("3x3dbl_1", 64, 1, 1), ("3x3dbl_2", 96, 3, 3), ("3x3dbl_3", 96, 3, 3)],
        ["average", ("_pool", pool, 1, 1)],
    ]


def block17(c):
    double = [("7x7dbl_1", c, 1, 1), ("7x7dbl_2", c, 7, 1), ("7x7dbl_3", c, 1, 7), ("7x7dbl_4", c, 7, 1)]
    return [
        [("1x1", 192, 1, 1)],
        [("7x7_1", c, 1, 1), ("7x7_2", c, 1, 7), ("7x7_3", 192, 7, 1)],
        [*double, ("7x7dbl_5", 192, 1, 7)],
        ["average", ("_pool", 192, 1, 1)],
    ]


def block8(pool):
    first, double = [("3x3_1", 384, 1, 1)], [("3x3dbl_1", 448, 1, 1), ("3x3dbl_2", 384, 3, 3)]
    return [
        [("1x1", 320, 1, 1)],
        [*first, [("3x3_2a", 384, 1, 3), ("3x3_2b", 384, 3, 1)]],
        [*double, [("3x3dbl_3a", 384, 1, 3), ("3x3dbl_3b", 384, 3, 1)]],
        [pool, ("_pool", 192, 1, 1)],
    ]


GRAPH = {
    "Mixed_5b": block35(32),
    "Mixed_5c": block35(64),
    "Mixed_5d": block35(64),
    "Mixed_6a": [
        [("3x3/2", 384, 3, 3)],
        [("3x3dbl_1", 64, 1, 1), ("3x3dbl_2", 96, 3, 3), ("3x3dbl_3/2", 96, 3, 3)],
        ["shrink"],
    ],
    "Mixed_6b": block17(128),
    "Mixed_6c": block17(160),
    "Mixed_6d": block17(160),
    "Mixed_6e": block17(192),
    "Mixed_7a": [
        [("3x3_1", 192, 1, 1), ("3x3_2/2", 320, 3, 3)],
        [("7x7x3_1", 192, 1, 1), ("7x7x3_2", 192, 1, 7), ("7x7x3_3", 192, 7, 1), ("7x7x3_4/2", 192, 3, 3)],
        ["shrink"],
    ],
    "Mixed_7b": block8("average"),
    "Mixed_7c": block8("maximum"),
}


class Plain:
    """The graph in numpy, (H, W, C) of one image: windows and matrix products, no torch.

    With weights it computes; without, it records the names and shapes of the tensors that it asks for.
    """

    def __init__(self, state=None):
        self.state, self.shapes = state, {}

    def window(self, x, kh, kw, stride, pad, fill):
        ph, pw = (kh // 2, kw // 2) if pad else (0, 0)
        x = np.pad(x, ((ph, ph), (pw, pw), (0, 0)), constant_values=fill)
        return np.lib.stride_tricks.sliding_window_view(x, (kh, kw), (0, 1))[::stride, ::stride]  # (H, W, C, kh, kw)

    def layer(self, x, name, c_out, kh, kw):
        name, _, kind = name.partition("/")
        shape = (c_out, x.shape[2], kh, kw)
        self.shapes |= {f"{name}.conv.weight": shape}
        self.shapes |= {f"{name}.bn.{key}": (c_out,) for key in ("weight", "bias", "running_mean", "running_var")}
        windows = self.window(x, kh, kw, 2 if kind == "2" else 1, kind == "", 0)
        if self.state is None:
            return np.broadcast_to(np.float64(0), (*windows.shape[:2], c_out))
        get = {key: self.state[f"{name}.{key}"].double().numpy() for key in ("conv.weight", "bn.weight", "bn.bias")}
        mean, var = (self.state[f"{name}.bn.{key}"].double().numpy() for key in ("running_mean", "running_var"))
        y = windows.reshape(*windows.shape[:2], -1) @ get["conv.weight"].reshape(c_out, -1).T
        return np.maximum((y - mean) / np.sqrt(var + 0.001) * get["bn.weight"] + get["bn.bias"], 0)

    def pool(self, x, kind):
        if kind == "average":  # over the pixels that exist
            ones = self.window(np.ones((*x.shape[:2], 1)), 3, 3, 1, True, 0).sum((-1, -2))
            return self.window(x, 3, 3, 1, True, 0).sum((-1, -2)) / ones
        stride, pad = (1, True) if kind == "maximum" else (2, False)
        return self.window(x, 3, 3, stride, pad, -np.inf).max((-1, -2))

    def branch(self, x, block, steps):
        for step in steps:
            if isinstance(step, list):
                return np.concatenate([self.layer(x, f"{block}.branch{s[0]}", *s[1:]) for s in step], 2)
            x = self.pool(x, step) if isinstance(step, str) else self.layer(x, f"{block}.branch{step[0]}", *step[1:])
        return x

    def __call__(self, x):
        for chain in STEM:
            for name, *rest in chain:
                x = self.layer(x, f"Conv2d_{name}", *rest)
            x = self.pool(x, "shrink")
        spatial = None
        for block, branches in GRAPH.items():
            outputs = [self.branch(x, block, steps) for steps in branches]
            if block == "Mixed_6d":
                spatial = outputs[0][..., :7].reshape(-1)  # mixed_6/conv
            x = np.concatenate(outputs, 2)
        return x.mean((0, 1)), spatial


def random_state(seed=0):
    """Weights of the published names and shapes that keep activations near 1 through the depth."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in Inception().state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim == 4:
            state[name] = noise * (2 / value[0].numel()) ** 0.5
        elif name.endswith("running_var") or name.endswith("bn.weight"):
            state[name] = 1 + 0.2 * noise.clamp(-2, 2)
        else:
            state[name] = 0.05 * noise
    return state


@pytest.fixture(scope="module")
def state():
    return random_state()


@pytest.fixture
def weight_file(state, tmp_path):
    path = tmp_path / "x.pth"
    torch.save(state, path)
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    return path.rename(tmp_path / f"random-{sha[:8]}.pth")


def test_tensors_are_those_of_the_published_file():
    """94 convolutions of five tensors and the classifier; 23,850,960 parameters."""
    plain = Plain()
    plain(np.zeros((299, 299, 3)))
    expected = {**plain.shapes, "fc.weight": (1008, 2048), "fc.bias": (1008,)}
    with torch.device("meta"):
        model = Inception()
    found = {k: tuple(v.shape) for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert found == expected and len(found) == 94 * 5 + 2
    assert sum(p.numel() for p in model.parameters()) == 23_850_960


def test_features_equal_a_plain_numpy_graph(state):
    image = torch.randint(0, 256, (1, 64, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x = preprocess(image)
    pool, spatial = Plain(state)(x[0].permute(1, 2, 0).double().numpy())
    with torch.inference_mode():
        found = load_state(state, "random")(x)
    assert found.pool.shape == (1, 2048) and found.spatial.shape == (1, 2023)
    for ours, plain in ((found.pool[0], pool), (found.spatial[0], spatial)):
        assert plain.std() > 1e-2  # there is something to compare
        np.testing.assert_allclose(ours.numpy(), plain, atol=1e-4 * np.abs(plain).max())


def test_probabilities_leave_the_bias_out(state):
    pool = torch.rand(3, 2048, generator=torch.Generator().manual_seed(0))
    logits = pool.double().numpy() @ state["fc.weight"].double().numpy().T
    expected = np.exp(logits - logits.max(1, keepdims=True))
    expected /= expected.sum(1, keepdims=True)
    found = load_state(state, "random").probabilities(pool.double())
    assert found.shape == (3, 1008)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)


def test_preprocessing_like_tensorflow_samples_at_multiples_of_the_scale():
    """A ramp of slope 1 becomes one of slope old / 299 from 0, held at the last pixel; then (x - 128) / 128."""
    ramp = torch.arange(64, dtype=torch.uint8).view(1, 1, 64, 1).expand(1, 64, 64, 3)
    found = preprocess(ramp)[0, 1, 100] * 128 + 128  # (299,)
    expected = (torch.arange(299) * (64 / 299)).clamp(max=63)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    tall = preprocess(ramp.transpose(1, 2))[0, 1, :, 100] * 128 + 128
    torch.testing.assert_close(tall, expected, rtol=0, atol=1e-4)
    large = preprocess(torch.full((1, 512, 512, 3), 255, dtype=torch.uint8))
    torch.testing.assert_close(large, torch.full((1, 3, 299, 299), 127 / 128))


def test_preprocessing_like_pytorch_fid_is_torchs_bilinear_in_minus_one_to_one():
    image = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = preprocess(image, "pytorch-fid")
    unscaled = F.interpolate(image.permute(0, 3, 1, 2).double(), (299, 299), mode="bilinear") / 127.5 - 1
    torch.testing.assert_close(found, unscaled.float(), rtol=0, atol=1e-5)
    assert (found - preprocess(image)).abs().max() > 0.1  # the two are not interchangeable


def test_a_weight_file_of_either_publisher_loads(weight_file, state):
    """With and without batch norm's counters; the file's hash is checked against its name."""
    model, sha = load_inception(weight_file)
    assert sha == hashlib.sha256(weight_file.read_bytes()).hexdigest() and not model.training
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    counted = {name.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for name in state if "mean" in name}
    assert load_state({**state, **counted}, "counted").fc.weight.shape == (1008, 2048)


def test_other_bytes_than_the_name_says_are_refused(weight_file):
    for name in (*inception.FILES, "weights.pth", "weights-00000000.pth"):
        other = weight_file.with_name(name)
        other.write_bytes(weight_file.read_bytes()[:1000])
        with pytest.raises(UserError, match="expected SHA-256"):
            check_file(other)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("fc.bias"), "misses 1 tensors, such as fc.bias"),
        (lambda s: s.update({"AuxLogits.fc.bias": torch.zeros(8)}), "has unknown 1 tensors, such as AuxLogits"),
        (
            lambda s: s.update({"fc.weight": torch.zeros(1000, 2048)}),
            r"expected shape \(1008, 2048\), got \(1000, 2048\)",
        ),
        (lambda s: s.update({"fc.bias": torch.full((1008,), torch.nan)}), "NaN"),
    ],
)
def test_another_networks_weights_are_refused(state, change, words):
    state = dict(state)
    change(state)
    with pytest.raises(UserError, match=words):
        load_state(state, "other.pth")


def test_weights_are_found_among_torch_hubs_and_downloaded_only_when_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    asked = []

    def download(url, target, hash_prefix):
        asked.append((url, hash_prefix))
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(UserError, match="none of pt_inception"):
        find_weights()
    assert not asked
    with pytest.raises(UserError, match="could not download"):
        find_weights(download=True)
    assert asked == [(inception.URL, inception.SHA256)]
    (tmp_path / "checkpoints" / inception.FILES[1]).touch()
    assert find_weights().name == inception.FILES[1]
