"""From a config to objects: the only place where a name in a YAML file becomes a constructor."""

from collections.abc import Callable
from typing import Any

import torch

from uvit_fast.config import Config, ModelConfig, UNetConfig
from uvit_fast.data import dali, datasets, latents
from uvit_fast.diffusion import samplers, schedules
from uvit_fast.model.unet import UNet
from uvit_fast.model.uvit import UViT

NETWORKS: dict[type, Callable[..., UViT | UNet]] = {ModelConfig: UViT, UNetConfig: UNet}

SCHEDULES: dict[str, Callable[[], Any]] = {
    "vp": schedules.VPSchedule,
    "sd": schedules.SDSchedule,
}

SAMPLERS: dict[str, Callable[..., Any]] = {
    "dpm_fast": samplers.DPMSolverSinglestep,
    "dpmpp_fast": samplers.DPMSolverPPSinglestep,
    "dpmpp_2m": samplers.DPMSolverPPMultistep,
    "euler_maruyama": samplers.EulerMaruyama,
}

DATASETS: dict[str, Callable[[Config], Any]] = {
    "digits": lambda cfg: datasets.digits(),
    "synthetic": lambda cfg: datasets.Synthetic(
        shape=(cfg.model.in_chans, cfg.model.img_size, cfg.model.img_size),
        num_classes=cfg.model.num_classes,
        text_shape=(cfg.model.context_tokens, cfg.model.context_dim) if cfg.model.context_dim else None,
    ),
    "cifar10": lambda cfg: datasets.cifar10(cfg.data.path, cfg.data.flip, labelled=cfg.model.num_classes > 0),
    "fashion_mnist": lambda cfg: datasets.fashion_mnist(cfg.data.path, cfg.data.flip),
    "images": lambda cfg: dali.image_folder(
        cfg.data.decoder,
        cfg.data.num_workers,
        cfg.data.path,
        cfg.model.img_size,
        cfg.data.crop,
        cfg.data.flip,
        labelled=cfg.model.num_classes > 0,
        skip_unreadable=cfg.data.unreadable == "skip",
        background=cfg.data.background,
    ),
    "latents": lambda cfg: latents.Latents(
        cfg.data.path, cfg.latent.scale_factor, skip_damaged=cfg.data.unreadable == "skip"
    ),
    "text_latents": lambda cfg: latents.TextLatents(
        cfg.data.path, cfg.latent.scale_factor, skip_damaged=cfg.data.unreadable == "skip"
    ),
}


def build_model(cfg: Config) -> UViT | UNet:
    """The network of `cfg.model`, initialised from `cfg.train.seed`; `model(x, t, y=None, context=None)` -> eps.

    t is what the network receives: 999 t for VP, n for SD. Under `torch.device("meta")` nothing is allocated.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.train.seed)
        return NETWORKS[type(cfg.model)](**cfg.model.model_dump())


def build_schedule(cfg: Config) -> Any:
    """The noise schedule of `cfg.diffusion`."""
    return SCHEDULES[cfg.diffusion.schedule]()


def build_sampler(cfg: Config, steps: int | None = None) -> Any:
    """The sampler of `cfg.sample`: `sampler(eps_fn, x_T)` -> x_0, with `eps_fn(x, t_network)`.

    Args:
        steps: network evaluations (NFE); default `cfg.sample.steps`.
    """
    steps = cfg.sample.steps if steps is None else steps
    return SAMPLERS[cfg.sample.sampler](build_schedule(cfg), steps, cfg.sample.spacing)


def build_dataset(cfg: Config) -> Any:
    """The training data of `cfg.data`, checked against the model's shapes.

    Raises:
        UserError: the folder is missing, empty, or holds something else than the config says.
    """
    dataset = DATASETS[cfg.data.name](cfg)
    datasets.check_fits(dataset, cfg)
    return dataset
