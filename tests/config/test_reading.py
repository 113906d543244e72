"""Files, their bases and overrides are merged as they say, and a mistake is named with where it was made."""

import random

import pytest

from tests.test_config import CONFIGS
from uvit_fast.config import Config, ConfigError, config_names, dump_config, load_config


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
        ("sampler=euler", ["sampler: unknown key; did you mean sample.sampler?"]),  # a key without its section
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
