"""Round a network's e4m3 weights for the inputs that they meet as it samples."""

import torch

from uvit_fast.build import PREDICTIONS, SAMPLERS, SCHEDULES
from uvit_fast.diffusion.noise import sample_noise
from uvit_fast.model import ops
from uvit_fast.model.fp8 import Fp8UViT
from uvit_fast.runtime.graphs import recording

IMAGES, EVALUATIONS = 32, 10


def calibrate(net: Fp8UViT, schedule: str, prediction: str) -> None:
    """Let the network draw a few samples, of labels spread over all that it has, and round its weights for them: see
    `Fp8UViT.calibrate`. DPM-Solver draws them, whatever will draw later, so a network's weights are always the same.
    Networks of text stay as they are: their inputs are not known without prompts.

    Args:
        schedule, prediction: the model's, by their names in `diffusion`.
    """
    model = net.net
    if model.context_dim:
        return
    noising = SCHEDULES[schedule]()
    sampler = SAMPLERS["dpm_fast"](noising, EVALUATIONS, None, PREDICTIONS[prediction](noising), 1.0)
    device = model.pos_embed.device
    x_T = sample_noise(0, range(IMAGES), (model.in_chans, model.img_size, model.img_size)).to(device)
    y = torch.linspace(0, model.num_classes - 1, IMAGES, device=device).long() if model.num_classes else None
    with recording():  # as it is written
        ops.compile_ahead(device, net, lambda: net(x_T, torch.ones(IMAGES, device=device), y))
    net.calibrate(lambda: sampler(lambda x, t: net(x, t, y), x_T))
