"""The configs are the paper's, and their defaults what users expect."""

import os
from pathlib import Path

import pytest
import torch

from uvit_fast.build import build_model
from uvit_fast.config import Config, ConfigError, load_config

CONFIGS = Path(__file__).parent.parent / "configs"

# Exact parameter counts of the published models (paper, Table 1 and Appendix).
PARAMETERS = {
    "s2_cifar10": 44_255_328,
    "s4_celeba64": 44_292_228,
    "m4_64": 130_940_292,
    "l4_64": 286_827_652,
    "l2_256": 286_763_172,
    "h2_256": 500_832_016,
    "l4_512": 286_861_524,
    "h4_512": 500_942_656,
    "uvit_h_dc_512": 500_868_896,
    "usit_h_512": 500_868_896,
    "s2_coco": 44_692_644,
    "s2deep_coco": 58_345_636,
}

# batch, iterations, warm-up, betas, lr, schedule, p_uncond, guidance, conv, decoder is the fine-tuned one, sampler,
# steps, checkpointing
TRAINING = {
    "s2_cifar10": (128, 500_000, 2500, (0.99, 0.999), 2e-4, "vp", 0, 0, True, None, "euler_maruyama", 1000, "none"),
    "s4_celeba64": (128, 500_000, 5000, (0.99, 0.99), 2e-4, "vp", 0, 0, True, None, "euler_maruyama", 1000, "none"),
    "m4_64": (1024, 300_000, 5000, (0.99, 0.99), 3e-4, "vp", 0, 0, True, None, "dpm_fast", 50, "block"),
    "l4_64": (1024, 300_000, 5000, (0.99, 0.99), 3e-4, "vp", 0, 0, True, None, "dpm_fast", 50, "block"),
    "l2_256": (1024, 300_000, 5000, (0.99, 0.99), 2e-4, "vp", 0.15, 0.4, True, False, "dpm_fast", 50, "block"),
    "h2_256": (1024, 500_000, 5000, (0.99, 0.99), 2e-4, "sd", 0.1, 0.4, False, True, "dpmpp_fast", 50, "block"),
    "l4_512": (1024, 500_000, 5000, (0.99, 0.99), 2e-4, "vp", 0.15, 0.7, True, False, "dpm_fast", 50, "block"),
    "h4_512": (1024, 500_000, 5000, (0.99, 0.99), 2e-4, "sd", 0.1, 0.7, False, True, "dpmpp_fast", 50, "block"),
    "uvit_h_dc_512": (1024, 500_000, 5000, (0.99, 0.99), 2e-4, "sd", 0.1, 0.5, False, False, "dpmpp_fast", 30, "block"),
    "usit_h_512": (1024, 500_000, 5000, (0.99, 0.99), 1e-4, "flow_sit", 0.1, 0.2, False, False, "heun", 50, "block"),
    "s2_coco": (256, 1_000_000, 5000, (0.9, 0.9), 2e-4, "sd", 0.1, 1.0, True, False, "dpmpp_fast", 50, "none"),
    "s2deep_coco": (256, 1_000_000, 5000, (0.9, 0.9), 2e-4, "sd", 0.1, 1.0, True, False, "dpmpp_fast", 50, "none"),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_models_have_the_published_parameter_counts(name):
    with torch.device("meta"):
        model = build_model(load_config(CONFIGS / f"{name}.yaml"))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(("size", "expected"), [((512, 12, 8), 44_788_768), ((2048, 28, 32), 1_580_396_576)])
def test_dc_aes_other_sizes_are_three_numbers(size, expected):
    """U-ViT-S and -2B of its table: 44.79 M and 1,580.40 M."""
    overrides = [f"model.{key}={n}" for key, n in zip(("embed_dim", "depth", "num_heads"), size)]
    with torch.device("meta"):
        model = build_model(load_config(CONFIGS / "uvit_h_dc_512.yaml", overrides))
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize("name", TRAINING)
def test_published_training_settings(name):
    cfg = load_config(CONFIGS / f"{name}.yaml")
    decoder = cfg.latent and cfg.latent.autoencoder == "stabilityai/sd-vae-ft-ema"
    train = cfg.train
    assert TRAINING[name] == (
        *(train.batch_size, train.iterations, train.warmup_steps, train.betas, train.lr, cfg.diffusion.schedule),
        *(train.p_uncond, cfg.sample.guidance_scale, cfg.model.conv, decoder, cfg.sample.sampler, cfg.sample.steps),
        cfg.model.activation_checkpointing,
    )
    decay = 0.0 if name == "usit_h_512" else 0.03
    assert (train.weight_decay, train.ema_decay, train.grad_clip) == (decay, 0.9999, 0)
    assert cfg.name == name


def test_latent_scale_factors_and_null_labels():
    """COCO's latents have their own factor; only models trained with label dropping have a null label, the last."""
    configs = {name: load_config(CONFIGS / f"{name}.yaml") for name in PARAMETERS}
    factors = {name: cfg.latent.scale_factor for name, cfg in configs.items() if cfg.latent}
    latent = dict.fromkeys(("l2_256", "h2_256", "l4_512", "h4_512"), 0.18215)
    assert factors == {
        **latent,
        "s2_coco": 0.23010,
        "s2deep_coco": 0.23010,
        "uvit_h_dc_512": 0.3189,
        "usit_h_512": 0.3189,
    }
    assert configs["h2_256"].null_label == 1000
    assert configs["l4_64"].null_label is None


def test_the_published_and_demo_configs_are_there():
    assert {*PARAMETERS, "digits", "digits_eps"} <= {path.stem for path in CONFIGS.glob("*.yaml")}


@pytest.mark.parametrize("key", ["train.init_replace", "train.trainable", "sample.fp8_keep"])
def test_one_name_is_a_list_of_one(key):
    section, name = key.split(".")
    cfg = load_config(CONFIGS / "digits.yaml", [f"{key}=norm", "train.init=weights.pth"])
    assert getattr(getattr(cfg, section), name) == ("norm",)


def test_the_paper_is_the_default_and_a_flows_velocity_that_of_a_flow():
    path = CONFIGS / "m4_64.yaml"
    paper = load_config(path).diffusion.model_dump()
    assert (paper["prediction"], paper["time"], paper["time_shift"], paper["weighting"]) == (
        "eps",
        "uniform",
        1,
        "none",
    )
    assert load_config(path, ["diffusion.schedule=flow"]).diffusion.prediction == "velocity"
    assert load_config(path, ["diffusion.schedule=flow_sit", "diffusion.prediction=x0"]).diffusion.prediction == "x0"
    for override in ("sample.sampler=euler_maruyama", "sample.sampler=heun", "sample.spacing=karras"):
        with pytest.raises(ConfigError, match="sample.s"):
            load_config(path, ["diffusion.schedule=flow", "sample.sampler=euler", "sample.spacing=time", override])


def test_fine_tuning_takes_names_and_draws_no_samples_unless_asked(monkeypatch, tmp_path):
    """One name needs no brackets; a path is absolute; held-out loss alone needs no Inception."""
    monkeypatch.chdir(tmp_path)
    cfg = load_config(CONFIGS / "finetune_256.yaml", ["train.trainable=norm", "train.init_replace=label_emb"])
    assert (cfg.train.trainable, cfg.train.init_replace) == (("norm",), ("label_emb",))
    assert cfg.train.init == f"{tmp_path}/imagenet256_uvit_huge.pth" and cfg.null_label == 10
    assert (cfg.evaluate.held_out, cfg.evaluate.drawn) == (100, 0)
    both = load_config(CONFIGS / "finetune_256.yaml", ["evaluate.held_out=mine", "evaluate.samples=64"]).evaluate
    assert (both.held_out, both.drawn) == (f"{tmp_path}/mine", 64)
    assert load_config(CONFIGS / "digits.yaml", ["evaluate.every=1"]).evaluate.drawn == 10_000


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        (
            "scale_factor",
            "-1",
            "latent.scale_factor: expected a positive number, one per channel .*, or measured, got -1",
        ),
        ("scale_factor", "yes", "latent.scale_factor: expected a positive number, .*, got True"),
        ("scale_factor", "[1, 2, 3]", "latent.scale_factor: expected one number, or 4, as model.in_chans says; got 3"),
        ("shift_factor", "[1, a, 3, 4]", "latent.shift_factor: expected a number, or one per channel in brackets, got"),
        ("shift_factor", "measured", "latent.shift_factor: expected a number, .*, got 'measured'"),
    ],
)
def test_what_scales_latents_is_a_number_or_one_a_channel(key, value, expected):
    with pytest.raises(ConfigError, match=expected) as error:
        load_config(CONFIGS / "h2_256.yaml", [f"latent.{key}={value}"])
    assert "\n" not in str(error.value)
    cfg = load_config(CONFIGS / "h2_256.yaml", ["latent.scale_factor=[1, 2, 3, 4]", "latent.shift_factor=-0.1"])
    assert (cfg.latent.scale_factor, cfg.latent.shift_factor) == ((1.0, 2.0, 3.0, 4.0), -0.1)
    with pytest.raises(ConfigError, match="shift_factor is measured where scale_factor is"):
        load_config(CONFIGS / "h2_256.yaml", ["latent.scale_factor=measured", "latent.shift_factor=1"])


def test_paths_are_kept_absolute(tmp_path, monkeypatch):
    """A run is continued from its config.yaml from any folder; what is no folder here is a name on the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vae").mkdir()
    settings = [
        "data.path=pictures",
        "latent.decoder=vae",  # as `autoencoder` is called in older runs
        "evaluate.every=1",
        "evaluate.reference=~/real.npz",
    ]
    cfg = load_config(CONFIGS / "digits.yaml", settings)
    assert (cfg.data.path, cfg.latent.autoencoder) == (f"{tmp_path}/pictures", f"{tmp_path}/vae")
    assert cfg.evaluate.reference == os.path.expanduser("~/real.npz")
    assert load_config(CONFIGS / "digits.yaml", ["latent.autoencoder=owner/vae"]).latent.autoencoder == "owner/vae"


def test_every_key_is_read_somewhere():
    """A key that nothing reads would be a setting that is silently not honoured."""
    code = "".join(p.read_text() for p in (CONFIGS.parent / "uvit_fast").rglob("*.py") if p.parent.name != "config")
    code += (CONFIGS.parent / "train.py").read_text()
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    for name, section in sections.items():
        if name == "model":  # passed whole to the constructor
            continue
        section = next((o for o in [section, *getattr(section, "__args__", ())] if hasattr(o, "model_fields")), None)
        for key in section.model_fields if section else []:
            assert f".{key}" in code, f"{name}.{key} is read nowhere"
