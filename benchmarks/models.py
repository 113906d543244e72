"""The networks of whole-model benchmarks, by provider: ours, and the published network as its users run it today.

`ours-fp8` samples with e4m3 operands in its blocks' products. All have the same bf16 weights for a size. The peers call
the published network's layers, with cuDNN's attention where it is faster than PyTorch's own choice: `eager`;
`compiled`, torch.compile block by block; `compiled-graphs`, the whole network under
torch.compile(mode="reduce-overhead"); `torchao-fp8`, the blocks' linear layers in float8 by torchao, compiled block by
block.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from uvit_fast import build_model, load_config
from uvit_fast.build import build_objective
from uvit_fast.config import Config
from uvit_fast.kernels.ops import fp8_block
from uvit_fast.kernels.runtime.device import forced
from uvit_fast.model.attention import attend
from uvit_fast.model.fp8 import Fp8UViT
from uvit_fast.model.uvit import Block

CONFIGS = {"S": "s2_cifar10", "M": "m4_64", "L": "l2_256", "H": "h2_256"}
LATENT = ["model.img_size=32", "model.patch_size=2", "model.in_chans=4", "model.num_classes=1001"]  # 258 tokens for all
OTHERS = {"USiT": "usit_h_512"}  # at its own latents, 16 x 16 x 32, which are as many tokens
FROZEN = {  # provider -> its trainable parameters (`train.trainable`)
    "ours-out_blocks": "[out_blocks,norm,decoder_pred,label_emb]",
    "ours-label_emb": "[label_emb]",
}
PEERS = ("eager", "compiled", "compiled-graphs", "torchao-fp8")
MOST_IN_GRAPHS = 16  # images for `compiled-graphs`: with more, the GPU takes longer than Python
FEW = 4  # images that are compared


class PublishedBlock(Block):
    """The block of the published code: its layers are called, so that a library can replace them."""

    def compute(self, x: Tensor, skip: Tensor | None, sums: None) -> tuple[Tensor, None]:
        """Map x and skip (B, L, D) to (B, L, D)."""
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))  # (B, L, D)
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x)), None


def config(size: str, provider: str, checkpointing: str = "none", overrides: Sequence[str] = ()) -> Config:
    """Return the config of S, M, L or H on 32 x 32 x 4 latents with 1001 classes, or of USiT, with `overrides`."""
    how = ["model.kernels=reference", "model.attention=sdpa"]
    if provider.startswith("ours"):
        how = ["model.kernels=auto", "model.attention=auto"]
    settings = [*how, f"model.activation_checkpointing={checkpointing}", "data.name=synthetic"]
    return load(size, [*settings, *overrides])


def load(size: str, overrides: Sequence[str]) -> Config:
    """Return a size's config at the latents on which it is measured."""
    latents = [] if size in OTHERS else LATENT
    return load_config((CONFIGS | OTHERS)[size], [*latents, *overrides])


def model(
    cfg: Config, provider: str, device: torch.device | str = "cuda", batch: int = 1, training: bool = False
) -> nn.Module:
    """Return a network on the device, in bf16; its weights depend on the config alone. Compilation happens in the first
    call.

    Args:
        batch: images per call, by which a peer's attention is chosen.
    """
    torch.manual_seed(0)
    with torch.device(device):  # initialised there, which saves minutes for the large ones
        net = build_model(cfg).to(torch.bfloat16).train(training)
    if provider == "ours-fp8":
        return Fp8UViT(net)
    if provider.startswith("ours"):
        return net
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # rather than silently run eagerly
    backend = attention(cfg, batch, device, training)
    for block in net.blocks:
        block.__class__, block.attn.backend = PublishedBlock, backend
        if provider == "torchao-fp8":
            in_float8(block, training)
        if provider in ("compiled", "torchao-fp8"):  # equal blocks share one compilation
            block.compile(dynamic=False)
    return torch.compile(net, mode="reduce-overhead", dynamic=False) if provider == "compiled-graphs" else net


def runnable(providers: Sequence[str], device: torch.device | str = "cuda") -> list[str]:
    """Return those whose packages are installed and whose kernels support the device; print which are left out."""
    reasons = {
        "torchao-fp8": lambda: None if find_spec("torchao") else "it needs torchao: pip install torchao==0.17.0",
        "ours-fp8": lambda: fp8_block.why_not(1152, 16, 4608, torch.device(device)),
    }
    found = []
    for provider in providers:
        if reason := provider in reasons and reasons[provider]():
            print(f"left out: {provider}: {reason}", flush=True)
        else:
            found.append(provider)
    return found


def in_float8(block: nn.Module, training: bool) -> None:
    """Replace the linear layers by torchao's float8: scales by row in inference, by tensor in training."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    if training:
        convert_to_float8_training(block, config=Float8LinearConfig.from_recipe_name("tensorwise"))
    else:
        quantize_(block, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))


def attention(cfg: Config, batch: int, device: torch.device | str, training: bool) -> str:
    """Return the faster of cuDNN's attention and PyTorch's own choice, as a name of `model.attention`."""
    if torch.device(device).type != "cuda":
        return "sdpa"
    m, tokens = cfg.model, 2 + (cfg.model.img_size // cfg.model.patch_size) ** 2
    shape = (batch, tokens, 3, m.num_heads, m.embed_dim // m.num_heads)
    qkv = torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=training)
    dout = torch.randn(batch, tokens, m.embed_dim, device=device, dtype=torch.bfloat16)

    def milliseconds(name: str, calls: int = 10) -> float:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        with torch.set_grad_enabled(training):
            for i in range(calls + 2):
                if i == 2:  # the GPU sleeps while Python queues the calls
                    torch.cuda._sleep(20_000_000)
                    marks[0].record()
                out = attend(qkv, name)
                if training:
                    torch.autograd.grad(out, qkv, dout)
        marks[1].record()
        torch.cuda.synchronize()
        return marks[0].elapsed_time(marks[1])

    return min(("cudnn", "sdpa"), key=milliseconds)


def kernels_of(provider: str) -> AbstractContextManager[None]:
    """While open, let `ours-sm80` run the kernels of an A100, whatever the card."""
    return forced(80) if provider.endswith("-sm80") else nullcontext()


def dtype(provider: str) -> str:
    """Return the precision in which the blocks' linear layers compute."""
    return "fp8" if provider.endswith("fp8") else "bf16"


def images(cfg: Config, batch: int, device: torch.device | str = "cuda") -> tuple[Tensor, Tensor, Tensor]:
    """Return random latents (B, C, H, W), network times (B,) and labels (B,)."""
    x = torch.randn(batch, cfg.model.in_chans, cfg.model.img_size, cfg.model.img_size, device=device)
    return x, torch.rand(batch, device=device) * 999, torch.randint(1000, (batch,), device=device)


def loss(cfg: Config, batch: int, device: torch.device | str = "cuda") -> Callable[[nn.Module], Tensor]:
    """Return the trainer's loss of a network, on random latents, noise, times and labels that are drawn once."""
    objective, (x, _, y) = build_objective(cfg), images(cfg, batch, device)
    noise, u = torch.randn_like(x), torch.rand(batch, device=device)
    return lambda network: objective.loss(network, x, noise, u, y=y)


class Agreement:
    """Compare networks with the published one: the eps of a few images, with the same weights, in fp32.

    Attributes:
        own: the relative error of the published network itself in bf16.
    """

    def __init__(self, cfg: Config, device: torch.device | str):
        """cfg: that of the provider `eager`."""
        self.cfg, self.device = cfg, device
        net, self.inputs = model(cfg, "eager", device).eval(), images(cfg, FEW, device)
        with torch.no_grad():
            x, t, y = self.inputs
            half = net(x, t, y=y)
            for block in net.blocks:
                block.attn.backend = "sdpa"  # cuDNN's takes no fp32
            self.eps = net.float()(x, t, y=y)
        self.own = difference(half, self.eps)

    def check(self, net: nn.Module, provider: str, batch: int) -> float:
        """Call the network on `batch` images, which compiles it, and compare the first ones; return the relative error.

        Raises:
            RuntimeError: the error is more than twice the published network's own in bf16, or, in float8, more than
                twice the largest rounding error of a value with three bits of mantissa, 2^-4. Float8 changes eps by
                about that rounding error (6e-2 for S/2, 9e-2 for L/2 and H/2 with random weights on an H200), ten times
                bf16's: this check cannot see smaller errors; tests/gpu/test_fp8.py can.
        """
        few, inputs = min(FEW, batch), images(self.cfg, batch, self.device)
        for values, some in zip(inputs, self.inputs):
            values[:few] = some[:few]
        x, t, y = inputs
        error = difference(net(x, t, y=y)[:few].detach(), self.eps[:few])
        limit = 2 * 2**-4 if dtype(provider) == "fp8" else 2 * self.own + 1e-3
        if not error <= limit:
            raise RuntimeError(
                f"{provider}: eps is {error:.1e} from the published network's in fp32, expected {limit:.1e}"
            )
        return error


def difference(values: Tensor, wanted: Tensor) -> float:
    """Return |values - wanted| / |wanted|."""
    return ((values.float() - wanted.float()).norm() / wanted.float().norm()).item()
