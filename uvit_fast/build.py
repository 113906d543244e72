"""From a config to objects: the only place where a name in a YAML file becomes a constructor."""

import functools
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from uvit_fast.config import Config, ModelConfig, UNetConfig, plans
from uvit_fast.data import dali, datasets, in_memory, latents
from uvit_fast.diffusion import caching, predictions, samplers, schedules
from uvit_fast.diffusion.objective import Objective
from uvit_fast.diffusion.stages import Sampler, Staged
from uvit_fast.model.cached import sublayers
from uvit_fast.model.unet import UNet
from uvit_fast.model.uvit import UViT
from uvit_fast.provenance import Provenance
from uvit_fast.runtime.errors import UserError

NETWORKS: dict[type, Callable[..., UViT | UNet]] = {ModelConfig: UViT, UNetConfig: UNet}

SCHEDULES: dict[str, type[schedules.Schedule]] = {
    "vp": schedules.VPSchedule,
    "sd": schedules.SDSchedule,
    "flow": schedules.FlowSchedule,
    "flow_sit": schedules.SiTFlowSchedule,
}

PREDICTIONS: dict[
    str, Callable[[schedules.Schedule], predictions.Prediction]
] = {  # of a network trained with that schedule
    "eps": lambda schedule: predictions.Noise(),
    "v": lambda schedule: predictions.V(),
    "x0": lambda schedule: predictions.Data(),
    "velocity": lambda schedule: predictions.Velocity(to_data=isinstance(schedule, schedules.SiTFlowSchedule)),
}

SAMPLERS: dict[str, type[Staged]] = {
    "dpm_fast": samplers.DPMSolverSinglestep,
    "dpmpp_fast": samplers.DPMSolverPPSinglestep,
    "dpmpp_2m": samplers.DPMSolverPPMultistep,
    "euler_maruyama": samplers.EulerMaruyama,
    "euler": samplers.Euler,
    "heun": samplers.Heun,
}

DATASETS: dict[str, Callable[[Config], datasets.Indexed]] = {
    "digits": lambda cfg: in_memory.digits(),
    "synthetic": lambda cfg: in_memory.Synthetic(
        shape=(cfg.model.in_chans, cfg.model.img_size, cfg.model.img_size),
        num_classes=cfg.model.num_classes,
        text_shape=(cfg.model.context_tokens, cfg.model.context_dim) if cfg.model.context_dim else None,
    ),
    "cifar10": lambda cfg: in_memory.cifar10(cfg.data.path, cfg.data.flip, labelled=cfg.model.num_classes > 0),
    "fashion_mnist": lambda cfg: in_memory.fashion_mnist(cfg.data.path, cfg.data.flip),
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
    "latents": lambda cfg: _latents(latents.Latents, cfg),
    "text_latents": lambda cfg: _latents(latents.TextLatents, cfg),
}


def _latents(kind: type[latents.Latents], cfg: Config) -> latents.Latents:
    assert cfg.latent is not None, "a config of latents has the section"
    scale, shift = cfg.latent.scale_factor, cfg.latent.shift_factor
    return kind(cfg.data.path, scale, shift, skip_damaged=cfg.data.unreadable == "skip")


class _Unfilled(TorchFunctionMode):
    """Skip in-place initialisation: on meta tensors it does nothing, after a second of imports."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, filled = getattr(func, "__name__", ""), args[0] if args else kwargs.get("tensor")
        if name.endswith("_") and not name.endswith("__") and isinstance(filled, torch.Tensor) and filled.is_meta:
            return filled
        return func(*args, **kwargs)


def build_model(cfg: Config) -> UViT | UNet:
    """Return the network of `cfg.model`, initialised from `cfg.train.seed`: `model(x, t, y=None, context=None)` -> eps,
    or whatever `cfg.diffusion.prediction` names.

    t is the time as the network receives it: 999 t for VP, n for SD, 1000 t for flow. Under `torch.device("meta")`
    nothing is allocated.
    """
    on_meta = torch.get_default_device().type == "meta"
    with torch.random.fork_rng(devices=[]), _Unfilled() if on_meta else nullcontext():
        torch.manual_seed(cfg.train.seed)
        return NETWORKS[type(cfg.model)](**cfg.model.model_dump())


def build_schedule(cfg: Config) -> schedules.Schedule:
    """Return the noise schedule of `cfg.diffusion`."""
    return SCHEDULES[cfg.diffusion.schedule]()


def build_objective(cfg: Config) -> Objective:
    """Return the training objective of `cfg.diffusion`."""
    diffusion, schedule = cfg.diffusion, build_schedule(cfg)
    return Objective(
        schedule,
        PREDICTIONS[diffusion.prediction](schedule),
        (diffusion.time_mean, diffusion.time_std) if diffusion.time == "logit_normal" else None,
        diffusion.time_shift,
        diffusion.min_snr_gamma if diffusion.weighting == "min_snr" else None,
    )


def build_sampler(cfg: Config, steps: int | None = None) -> Sampler:
    """Return the sampler of `cfg.sample`: `sampler(eps_fn, x_T)` -> x_0, with `eps_fn(x, t_network)` -> the network's
    prediction. Configs that ask for the same one share it.

    Args:
        steps: network evaluations (NFE); default `cfg.sample.steps`.

    Raises:
        UserError: `cfg.sample.cache` is not a plan, or one for another network, sampler or number of evaluations.
    """
    sample, diffusion, steps = cfg.sample, cfg.diffusion, cfg.sample.steps if steps is None else steps
    names = sample.sampler, diffusion.schedule, diffusion.prediction
    sampler = _planned(*names, steps, sample.spacing, sample.shift)
    return sampler if sample.cache == "none" else sampler.caching(_cache_plan(cfg, sampler))


@functools.lru_cache(64)  # planning takes milliseconds, as does uploading its tables: a part of one image's time
def _planned(sampler: str, schedule: str, prediction: str, steps: int, spacing: str | None, shift: float) -> Sampler:
    path = SCHEDULES[schedule]()
    return SAMPLERS[sampler](path, steps, spacing, PREDICTIONS[prediction](path), shift)


def _cache_plan(cfg: Config, sampler: Sampler) -> caching.Plan:
    """Return which of the model's sublayers reuse their last output in which of the sampler's evaluations."""
    assert isinstance(cfg.model, ModelConfig)  # checked by the config
    cache, names, stages = cfg.sample.cache, sublayers(cfg.model.depth), sampler.stages
    if cache.startswith("outer:"):
        every, *outer = map(int, cache.split(":")[1:])
        kept, half = (outer or [1])[0], cfg.model.depth // 2
        if kept > half:
            raise UserError(f"sample.cache {cache}: expected at most {half} outer blocks, all of a side, got {kept}")
        inner = names[2 * kept : len(names) - 2 * kept]  # two per block
        begins = [True, *(stage.last for stage in stages[:-1])]
        return caching.outer_plan([stage.t for stage in stages], begins, inner, every)
    plan = plans.read_plan(Path(cache))
    if plan.sampler not in (None, cfg.sample.sampler):
        raise UserError(f"sample.cache {cache}: a plan for sample.sampler {plan.sampler}, got {cfg.sample.sampler}")
    if plan.steps != len(stages):
        raise UserError(f"sample.cache {cache}: a plan of {plan.steps} evaluations, got sample.steps {len(stages)}")
    reuse = plans.expanded(plan, names, f"sample.cache {cache}")
    if reuse[0]:
        raise UserError(f"sample.cache {cache}: the first evaluation has nothing to reuse; expected no entry 0")
    return reuse


def build_dataset(cfg: Config) -> datasets.Indexed:
    """Return the training data of `cfg.data`, checked against the model's shapes.

    Raises:
        UserError: the folder is missing, empty, or does not hold what the config says.
    """
    dataset = DATASETS[cfg.data.name](cfg)
    datasets.check_fits(dataset, cfg)
    return dataset


def hold_out(cfg: Config, dataset: datasets.Indexed) -> tuple[datasets.Indexed, datasets.Indexed | None]:
    """Return the data to train on, and those that `evaluate.held_out` names, whose loss is measured, or None.

    A number of images is drawn from the data, always the same ones, together with their mirror images.

    Raises:
        UserError: no image would be left, or a path whose data are not like these.
    """
    wanted = cfg.evaluate.held_out if cfg.evaluate else None
    if isinstance(wanted, str):
        return dataset, _held_out_at(wanted, cfg, dataset)
    return datasets.split(dataset, wanted) if wanted else (dataset, None)


def _held_out_at(path: str, cfg: Config, dataset: datasets.Indexed) -> datasets.Indexed:
    if cfg.data.name in ("digits", "synthetic") or cfg.data.path is None:
        raise UserError(
            f"evaluate.held_out: data {cfg.data.name} have no path: expected a number of images, got {path}"
        )
    here, trained_on = Path(path).resolve(), Path(cfg.data.path).resolve()
    if here == trained_on or (cfg.data.name == "images" and here.is_relative_to(trained_on)):  # with its subfolders
        raise UserError(f"evaluate.held_out {path}: expected other images than data.path, which is trained on")
    data = cfg.data.model_copy(update={"path": path, "flip": False})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about labels without an image, which the data itself may have
            found = build_dataset(cfg.model_copy(update={"data": data}))
    except UserError as error:
        raise UserError(f"evaluate.held_out: {str(error).removeprefix('data.path ')}") from None
    found.scaling = dataset.scaling  # it may have been measured
    labelled = cfg.model.num_classes > 0
    if difference := Provenance.of(dataset, labelled).difference(Provenance.of(found, labelled)):
        raise UserError(
            f"evaluate.held_out {path}: expected the classes and encoders of the training data: {difference}"
        )
    return found
