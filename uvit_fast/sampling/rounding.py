"""Round a network's e4m3 weights for the inputs that they meet as it samples."""

import torch

from uvit_fast.diffusion.noise import sample_generators, sample_noise
from uvit_fast.diffusion.stages import Sampler
from uvit_fast.model.fp8 import Fp8UViT

IMAGES, EVALUATIONS = 32, 10


def calibrate(net: Fp8UViT, sampler: Sampler) -> None:
    """Let the network draw a few samples, of labels spread over all that it has, and round its weights for them: see
    `Fp8UViT.calibrate`. Networks of text stay as they are: their inputs are not known without prompts.

    Args:
        sampler: of EVALUATIONS evaluations.
    """
    model, indices = net.net, range(IMAGES)
    if model.context_dim:
        return
    device = model.pos_embed.device
    x_T = sample_noise(0, indices, (model.in_chans, model.img_size, model.img_size)).to(device)
    y = torch.linspace(0, model.num_classes - 1, IMAGES, device=device).long() if model.num_classes else None
    net.calibrate(lambda: sampler(lambda x, t: net(x, t, y), x_T, generator=sample_generators(0, indices, device)))
