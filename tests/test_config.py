"""The configs are the paper's, and a mistake in one is named."""

import os
import random
from pathlib import Path

import pytest
import torch

from uvit_fast.build import build_model
from uvit_fast.config import Config, ConfigError, config_names, dump_config, load_config

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


def test_a_name_finds_the_packages_config_and_a_path_what_is_there(tmp_path, monkeypatch):
    """With or without .yaml, from any folder; a file of that name comes first, a folder does not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()  # as `sample --out digits` makes it
    assert load_config("digits") == load_config("digits.yaml") == load_config(CONFIGS / "digits.yaml")
    (tmp_path / "mine.yaml").write_text("base: h2_256\nname: mine\ntrain: {lr: 1.0e-5}\n")
    mine = load_config("mine.yaml", ["model.depth=2"])
    assert (mine.name, mine.train.lr, mine.model.embed_dim, mine.model.depth) == ("mine", 1e-5, 1152, 2)
    (tmp_path / "digits.yaml").write_text("base: s2_cifar10.yaml\nname: of this folder\n")
    assert load_config("digits.yaml").name == "of this folder" and load_config("digits").name == "digits"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("h2_255", "h2_255: no such config file; did you mean h2_256 or l2_256?"),
        ("coco", "did you mean s2_coco, s2deep_coco or unet_ldm_coco?"),
        ("configs/H4_512.yaml", "configs/H4_512.yaml: no such config file; did you mean h4_512"),  # from elsewhere
        ("mien", "mien: no such config file; did you mean mine.yaml?"),
        ("???", "expected a YAML file, or one of custom, custom_small, digits, "),
        ("run", "run: a folder; expected a config file; did you mean run/config.yaml?"),
    ],
)
def test_a_wrong_name_lists_near_ones(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    with pytest.raises(ConfigError) as error:
        load_config(name)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_dumped_config_loads_unchanged(tmp_path):
    cfg = load_config(CONFIGS / "h4_512.yaml")  # one with a base
    (tmp_path / "config.yaml").write_text(dump_config(cfg))
    assert load_config(tmp_path / "config.yaml") == cfg


def test_overrides_win_over_the_file_and_its_base():
    cfg = load_config(
        CONFIGS / "h4_512.yaml", ["train.batch_size=512", "train.betas=[0.9, 0.95]", "model.attention=math"]
    )
    assert (cfg.train.batch_size, cfg.train.betas, cfg.model.attention) == (512, (0.9, 0.95), "math")
    assert cfg.train.iterations == 500_000


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.batchsize=4", ["--set", "train.batchsize", "unknown", "'batch_size'"]),  # a mistyped key
        ("trian.lr=1", ["trian", "'train'"]),  # a mistyped section
        ("train.batch_size=many", ["train.batch_size", "expected a valid integer", "'many'"]),  # a wrong type
        ("model.skip=residual", ["model.skip", "'concat'", "'residual'"]),  # a name that is not there
        ("model.patch_size=3", ["model", "img_size 8", "patch_size 3"]),  # two keys that do not fit
        ("train.p_uncond=0", ["guidance_scale", "p_uncond"]),  # two sections that do not fit
        ("train.betas=[0.9]", ["train.betas.1", "AdamW's betas, in [0, 1)"]),  # too few
        ("train.lr=.inf", ["train.lr", "finite"]),
        ("train.seed=99999999999999999999", ["train.seed", "less than 4294967296"]),
        ("train.lr", ["override train.lr", "expected section.key=value"]),  # no value
        ("name.x=1", ["name", "not a section"]),  # a key below a value
        ("train.lr=!!float abc", ["override train.lr=!!float abc", "no float that can be used in line 1, column 1"]),
        ("name=!!timestamp abc", ["no timestamp that can be used"]),
        ("train={lr: 1, lr: 2}", ["lr is there twice in line 1, column 9"]),
        ("train.lr=" + "[" * 1000, ["nested too deeply"]),
        ("train.seed=0x" + "f" * 5000, ["less than 4294967296, got an integer of 20000 bits"]),
        (
            "train.log_every=10000000000",
            ["train.log_every", "expected less than or equal to 1000000"],
        ),  # a row's memory
        ("train.batch_size=" + "x" * 500, ["got '" + "x" * 78 + "…"]),
        ("name=" + "a" * 5000, ["name: expected text of at most 100 characters", "got '" + "a" * 78 + "…"]),
        ("name=../up", ["name", "expected a folder's name, without /", "'../up'"]),
        ('data.path="a\\0b"', ["data", "path: expected text without the character 0"]),
        ("data.path=" + "a" * 300, ["data.path", "expected a path that a file system can hold, got 300 characters"]),
        ("train.warmup_steps=yes", ["train.warmup_steps: expected a number, got true"]),
        ("train.betas=!!set {0.9, 0.99}", ["train.betas: expected a list in brackets"]),  # a set has no order
        ("model.num_classes=1", ["model.num_classes 1 with train.p_uncond leaves no class"]),
        (
            "diffusion.prediction=velocity",
            ["diffusion", "velocity is a flow's: expected eps, v or x0 with schedule vp"],
        ),
        ("diffusion.prediction=noise", ["diffusion.prediction", "'eps', 'v', 'x0' or 'velocity'", "got 'noise'"]),
        ("diffusion.time_std=2", ["time_mean and time_std are of time logit_normal"]),
        ("diffusion.min_snr_gamma=3", ["min_snr_gamma is of weighting min_snr"]),
        (
            "sample.sampler=heun",
            ["sample.sampler heun solves the ODE of a flow", "with vp expected one of the DPM-Solvers"],
        ),
        ("sample.shift=3", ["sample.shift moves times", "needs diffusion.schedule flow"]),
        ("train.init_replace=[label_emb]", ["train.init_replace needs train.init"]),
        ("train.trainable=[]", ["train.trainable: expected a list of at least 1, got []"]),
        ("train.trainable={a: 1}", ["train.trainable: expected a list in brackets, got {'a': 1}"]),
        ("train.trainable=*.bias", ["train.trainable", "text that begins with * wants quotes"]),
        ("train.init=3", ["train.init: expected text, got 3"]),
        ("train=3", ["train: expected a section of keys with values, got 3"]),
        ("evaluate={every: 5, held_out: 0}", ["evaluate.held_out: expected a number of images from 1", "got 0"]),
        ("evaluate={every: 5, held_out: [3]}", ["evaluate.held_out: expected a number of images", "got [3]"]),
        ("evaluate={every: 5, held_out: yes}", ["evaluate.held_out: expected a number"]),
        ("evaluate={every: 5, samples: 0}", ["evaluate", "samples 0 leaves nothing to evaluate"]),
    ],
)
def test_a_wrong_key_or_value_is_named_with_what_was_expected(override, words):
    with pytest.raises(ConfigError) as error:
        load_config(CONFIGS / "digits_eps.yaml", [override])
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


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


def test_overrides_may_be_a_mapping():
    """From Python the values are values; a mapping within one overrides key by key, as a file does its base."""
    path = CONFIGS / "digits.yaml"
    cfg = load_config(path, {"model.depth": 2, "train": {"lr": 0.5}, "train.betas": (0.5, 0.6)})
    assert (cfg.model.depth, cfg.train.lr, cfg.train.betas) == (2, 0.5, (0.5, 0.6))
    assert cfg.train.batch_size == load_config(path).train.batch_size
    assert load_config(path, "model.depth=2").model.depth == 2
    for wrong, words in (
        ({"model.dept": 2}, "did you mean 'depth'"),
        ({"sample.lr": 2}, "sample.lr: unknown key; did you mean train.lr?"),
        ({"train.epochs": 2}, "did you mean train.iterations?"),
        ({3: 2}, "expected section.key"),
        ([3], "expected"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_config(path, wrong)


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


def test_missing_file_names_the_nearest():
    with pytest.raises(ConfigError, match=r"h2_265.yaml: no such config file; did you mean .*h2_256.yaml"):
        load_config(CONFIGS / "h2_265.yaml")


@pytest.mark.parametrize("name", config_names())
def test_every_config_can_be_a_base_by_its_name(name, tmp_path):
    (tmp_path / f"{name}.yaml").write_text(f"base: {name}\ntrain: {{iterations: 7}}\n")  # named like its base
    (tmp_path / "mine.yaml").write_text(f"base: {name}.yaml\nname: mine\n")
    expected = load_config(name, {"train.iterations": 7, "name": "mine"})
    assert load_config(tmp_path / "mine.yaml") == expected


def test_a_file_that_is_a_base_of_itself_is_one_line(tmp_path):
    for name, base in (("a", "b"), ("b", "c"), ("c", "b")):
        (tmp_path / f"{name}.yaml").write_text(f"base: {base}.yaml\n")
    with pytest.raises(ConfigError, match=r"c.yaml: base: b.yaml -> c.yaml -> b.yaml leads back .*") as error:
        load_config(tmp_path / "a.yaml")
    assert "\n" not in str(error.value)


def test_a_sweep_is_told_its_command():
    with pytest.raises(ConfigError, match="digits.yaml: a sweep, not one config; expected uvit-fast sweep --config"):
        load_config(CONFIGS / "ablations" / "digits.yaml")


def test_an_error_that_an_override_makes_is_not_the_files():
    """Neither a value's, nor a combination's, nor a key's that its section lacks."""
    for wrong in ("train.lr=-1", "sample.sampler=euler_maruyama", "train.lrr=1", "evaluate={samples: 3}"):
        with pytest.raises(ConfigError, match="^--set: "):
            load_config(CONFIGS / "h2_256.yaml", [wrong])


@pytest.mark.parametrize(
    ("base", "top", "override", "expected"),
    [  # the errors' beginnings, in the order of the sections
        ("", "train: {batch_size: x}", "train.iterations=0", ["--set: train.it", "top.yaml: train.batch"]),
        ("", "train: {batch_size: x}", "train.batch_size=y", ["--set: train.batch"]),
        ("", "train: {batch_size: x}", "train.batch_size=3", []),
        ("train: {lr: -1, grad_clip: x}", "train: {lr: 1}", "name=mine", ["base.yaml: train.grad"]),
        ("train: {lr: -1}", "train: {lrr: 1}", "train={betas: [x, 1]}", [
            "base.yaml: train.lr:", "--set: train.betas.0", "--set: train.betas.1", "top.yaml: train.lrr"]),
        ("train: 3", "name: mine", "train.lr=1", ["override train.lr: train is a value, not a section"]),
        ("sample: {sampler: euler_maruyama}", "name: mine", "train.lr=1", ["base.yaml: sample.sampler euler_"]),
        ("name: base", "sample: {sampler: euler_maruyama}", "train.lr=1", ["top.yaml: sample.sampler euler_"]),
        ("name: base", "evaluate: {samples: 3}", "train.lr=0", ["--set: train.lr", "top.yaml: evaluate.every:"]),
    ],
)  # fmt: skip
def test_an_error_is_said_of_what_sets_it(base, top, override, expected, tmp_path):
    """The overrides, the file, or the file's base, whatever else is wrong."""
    (tmp_path / "base.yaml").write_text(f"base: digits\n{base}\n")
    (tmp_path / "top.yaml").write_text(f"base: base.yaml\n{top}\n")
    said = ""
    try:
        load_config(tmp_path / "top.yaml", [override])
    except ConfigError as error:
        said = str(error).replace(f"{tmp_path}/", "")
    lines = said.splitlines()
    assert len(lines) == len(expected) and all(map(str.startswith, lines, expected)), said


def test_a_missing_key_is_said_of_the_file_that_leaves_it_out(tmp_path):
    """Not of its base, which may leave it to others, nor of an override of another key of that section."""
    (tmp_path / "base.yaml").write_text("name: base\n")
    (tmp_path / "top.yaml").write_text("base: base.yaml\n")
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "top.yaml", ["train.lr=1"])
    assert all(line.startswith(f"{tmp_path}/top.yaml: ") for line in str(error.value).splitlines())
    assert "train.iterations: missing" in str(error.value)


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("", "expected a name or path, got None"),
        ("''", "expected a name or path, got ''"),
        ("[digits]", "expected a name or path, got ['digits']"),
        ("{name: x}", "expected a name or path, got {'name': 'x'}"),
        ("3", "expected a name or path, got 3"),
        ("digit", "digit: no such config file; did you mean digits"),
    ],
)
def test_a_base_is_a_name_or_path(base, expected, tmp_path):
    (tmp_path / "x.yaml").write_text(f"base: {base}\n")
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "x.yaml")
    assert str(error.value).startswith(f"{tmp_path}/x.yaml: base: {expected}")


def test_missing_section_says_what_belongs_there(tmp_path):
    (tmp_path / "x.yaml").write_text("name: x\nmodel: {}\n")
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "x.yaml")
    assert "model.img_size: missing; expected Height and width" in str(error.value)
    assert "diffusion: missing" in str(error.value)


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


NASTY = [
    *(
        "!!timestamp abc",
        "!!float abc",
        "!!bool maybe",
        "!!int ''",
        "!!binary a",
        "!!omap 3",
        "!!set {a}",
        "!t a",
        "!!python/name:os.x",
    ),
    *(
        "2020-13-45",
        "2020-01-02",
        "1:99:99",
        "0x",
        "0b2",
        ".inf",
        "-.inf",
        ".nan",
        "1e999",
        "-0",
        "~",
        "",
        "''",
        '"\\0"',
        '"\\uD800"',
    ),
    *(
        "&a [*a]",
        "&a {x: *a}",
        "*b",
        "<<: 3",
        "{<<: [1]}",
        "{a: 1, a: 2}",
        "[[[1]]]",
        "{1: 2}",
        "{[1]: 2}",
        "? a",
        "%TAG",
        "a: b: c",
    ),
    *(
        "- x",
        "|",
        ">",
        "@",
        "`",
        "#",
        "---",
        "...",
        "\ufeff",
        "\u2028",
        "\x85",
        "\x07",
        "\ud800",
        "ü火",
        "9" * 5000,
        "0x" + "f" * 5000,
    ),
    *(
        "x" * 5000,
        "x/" * 3000,
        "[" * 600,
        "{a: " * 600,
        "[" + "x," * 300 + "]",
        "-1",
        "10000000000",
        "1e30",
        "true",
        "None",
        "../..",
    ),
]


def fuzzed(rng: random.Random, text: str) -> tuple[str, list[str]]:
    """A config's text and overrides, one of them or both with something in them that does not belong there."""
    keys = [
        f"{name}.{key}"
        for name, field in Config.model_fields.items()
        for key in getattr(field.annotation, "model_fields", ())
    ]
    overrides = []
    if rng.random() < 0.5:
        key = rng.choice(
            [*keys, "name", "device", "model", "train", "model.img_size", "model.unet", "evaluate.every", "x", "", "."]
        )
        overrides = [f"{key}{rng.choice(['=', '=', '=', '.x=', ''])}{rng.choice(NASTY)}"]
    else:
        lines = text.split("\n")
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(lines))
            start = rng.randint(0, len(lines[at]))
            key = lines[at].split(":")[0]
            lines[at] = rng.choice(
                [
                    lines[at][:start] + rng.choice(NASTY)[:3000] + lines[at][start + rng.randint(0, 3) :],
                    f"{key}: {rng.choice(NASTY)}",
                    rng.choice(lines),
                    "",
                ]
            )
        text = "\n".join(lines)
    return text, overrides


def test_a_thousand_fuzzed_configs_load_or_are_refused_in_short_lines(tmp_path):
    rng, whole, fine = random.Random(0), (CONFIGS / "digits.yaml").read_text(), 0
    whole = "\n".join(line for line in whole.splitlines() if not line.startswith("#"))
    for i in range(1000):
        text, overrides = fuzzed(rng, whole)
        path = tmp_path / "x.yaml"
        path.write_text(text, errors="surrogatepass")
        try:
            load_config(path, overrides)
        except ConfigError as error:
            lines = str(error).split("\n")
            assert len(lines) <= 11 and all(line.isprintable() and len(line) < 500 for line in lines), (i, overrides)
        else:
            fine += 1
    assert 20 < fine < 500  # some are harmless, some are not
