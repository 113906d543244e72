"""`uvit-fast evaluate`: figures from files and from checkpoints, printed and written; one line for each mistake."""

import hashlib
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.data.photographs import JPEG
from tests.evaluation.test_features import MeanColours, npz_of, reference_of
from tests.evaluation.test_inception import random_state
from uvit_fast import build_model, cli, load_config, measuring
from uvit_fast.commands.arguments import reference_is_config
from uvit_fast.evaluation import inception
from uvit_fast.evaluation.sources import Images
from uvit_fast.provenance import UNKNOWN, Provenance
from uvit_fast.runtime.errors import UserError

DIGITS = "configs/digits.yaml"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights under the published names; the published weights are not here."""
    folder = tmp_path_factory.mktemp("inception")
    torch.save(random_state(), folder / "x.pth")
    sha = hashlib.sha256((folder / "x.pth").read_bytes()).hexdigest()
    return (folder / "x.pth").rename(folder / f"random-{sha[:8]}.pth")


@pytest.fixture
def run(tmp_path):
    def run(*arguments):
        return cli.main(["evaluate", "--cache", str(tmp_path / "cache"), "--device", "cpu", *map(str, arguments)])

    return run


@pytest.fixture
def run_with_classifier(run, digits_classifier, tmp_path):
    """`run`, whose cache has the digits' classifier."""
    (tmp_path / "cache").mkdir()
    shutil.copy(digits_classifier, tmp_path / "cache")
    return run


def images(path, count, seed):
    array = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)
    np.savez(path, arr_0=array)
    return path


def test_inceptions_figures_of_two_files(run, weights, tmp_path, capsys, monkeypatch):
    """All of Table 3; against itself the distances vanish. Few images: a warning with its consequence. A name that is
    no UTF-8 can be printed and written."""
    name = os.fsdecode(b"fake\xff.npz")
    samples, real = images(tmp_path / name, 5, 0), images(tmp_path / "real.npz", 6, 1)
    assert run("--samples", samples, "--reference", real, "--inception", weights, "--batch", 3) == 0
    printed = capsys.readouterr()
    assert "5 images, fewer than the 2048 feature dimensions" in printed.err and r"fake\udcff.npz" in printed.out
    result = json.loads((tmp_path / f"{name}.evaluation.json").read_text())
    assert set(result["metrics"]) == {"fid", "sfid", "is", "precision", "recall", "kid", "kid_std"}
    assert all(name in printed.out for name in result["metrics"])
    assert result["num_samples"] == 5 and result["num_reference"] == 6
    assert result["features"].endswith("-tensorflow") and np.isfinite(list(result["metrics"].values())).all()

    monkeypatch.setattr(inception, "find_weights", lambda download: weights)  # now as torch.hub would keep it
    out = tmp_path / "folder" / "same.json"
    assert run("--samples", real, "--reference", real, "--out", out) == 0
    same = json.loads(out.read_text())["metrics"]
    assert same["precision"] == same["recall"] == 1
    assert abs(same["fid"]) < 1e-4 * result["metrics"]["fid"]
    assert abs(same["sfid"]) < 1e-4 * result["metrics"]["sfid"]


def test_a_users_own_images_are_cropped_as_the_config_says_and_cached_under_that_crop():
    """Photographs of 640 x 427 pixels: --reference configs/custom.yaml --set data.path=DIR."""
    sets = [f"data.path={JPEG[0].parent}", "model.img_size=8"]
    real, labels, _ = measuring.real_images(load_config("configs/custom.yaml", sets), "custom")
    again, other = (
        measuring.real_images(load_config("configs/custom.yaml", [*sets, *more]), "custom")[0]
        for more in ([], ["data.crop=square"])
    )
    assert real.count == 2 and labels is None
    assert [batch.shape for batch in real.read([range(1), range(1, 2)])] == [(1, 8, 8, 3)] * 2
    assert real.identity() == again.identity() != other.identity()


@pytest.fixture
def checkpoint(tmp_path):
    small = ["model.embed_dim=32", "model.depth=2", "sample.steps=2"]
    cfg = load_config(DIGITS, small)
    path = tmp_path / "ema.safetensors"
    save_file(build_model(cfg).state_dict(), path)
    return ["--config", DIGITS, "--checkpoint", path, *[a for s in small for a in ("--set", s)]]


def test_digits_fid_of_a_checkpoint_and_of_its_saved_samples(run, checkpoint, tmp_path, monkeypatch, capsys):
    """Samples that are measured while they are drawn have the same figures as their files; the names say that it is no
    FID.
    """
    monkeypatch.setattr("uvit_fast.evaluation.classifier.STEPS", 150)
    common = ["--reference", DIGITS, "--features", "digits-fid"]
    folder = tmp_path / "pictures"
    assert run(*common, *checkpoint, "--num", 70, "--save-images", folder, "--out", tmp_path / "drawn.json") == 0
    assert "trained a classifier on 1,797 images" in capsys.readouterr().out
    assert Image.open(next(folder.glob("000069_class*.png"))).size == (8, 8)
    assert run(*common, "--samples", folder) == 0  # with the kept classifier and statistics
    assert "trained" not in capsys.readouterr().out
    drawn, read = (json.loads(p.read_text()) for p in (tmp_path / "drawn.json", tmp_path / "pictures.evaluation.json"))
    assert drawn["features"] == read["features"] and drawn["num_reference"] == 1797
    assert all(name.startswith("digits-") for name in drawn["metrics"]) and "digits-fid" in drawn["metrics"]
    for name in drawn["metrics"].keys() - {"digits-is"}:  # a folder's order is not the drawn one
        assert read["metrics"][name] == pytest.approx(drawn["metrics"][name], rel=1e-3, abs=1e-6)


def test_classes_may_be_chosen_and_then_the_references_are_the_same(run_with_classifier, checkpoint, tmp_path, capsys):
    """By name, though the reference numbers them otherwise."""
    run = run_with_classifier
    Provenance(("7", "1", "null")).write(tmp_path / "ema.data.json")
    common = ["--reference", DIGITS, "--features", "digits-fid", *checkpoint, "--num", 6, "--out", tmp_path / "x.json"]
    assert run(*common, "--classes", "name:7,name:1", "--save-images", tmp_path / "seven") == 0
    assert {p.name.split("_", 1)[1] for p in (tmp_path / "seven").iterdir()} == {"class0_7.png", "class1.png"}
    result = json.loads((tmp_path / "x.json").read_text())
    assert result["num_reference"] == 179 + 182 and result["reference"].endswith("7, 1")
    assert run(*common, "--classes", "null") == 2 and "none is called 'null'" in capsys.readouterr().err
    assert run("--samples", tmp_path, "--reference", DIGITS, "--classes", "label:7") == 2


def test_drawn_samples_are_not_mixed_with_others_and_figures_are_not_lost(
    run_with_classifier, checkpoint, tmp_path, capsys
):
    """A folder that holds files is refused before anything is drawn; figures that cannot be written are printed."""
    run = run_with_classifier
    common = ["--reference", DIGITS, "--features", "digits-fid", *checkpoint, "--num", 4]
    assert run(*common, "--save-images", tmp_path) == 2
    assert "holds files already; expected a new name or an empty folder" in capsys.readouterr().err
    assert run(*common, "--out", tmp_path) == 2
    printed = capsys.readouterr()
    assert "digits-fid  " in printed.out and "cannot be written (Is a directory); --out names another" in printed.err
    with pytest.raises(SystemExit):
        run(*common, "--seed", -1)
    assert "--seed: expected a whole number from 0" in capsys.readouterr().err


def test_a_runs_own_evaluation_warns_and_refuses_a_reference_of_another_size_before_it_trains(tmp_path, monkeypatch):
    """Not after the first `evaluate.every` steps."""
    cfg = load_config(DIGITS, ["evaluate.every=5", "evaluate.samples=20", "model.embed_dim=32", "model.depth=2"])
    statistics = {"mu": np.zeros(3), "sigma": np.eye(3)}
    for size, words in (
        (16, "images of 8 x 8 pixels, but .* has 16 x 16"),
        (None, "does not say what size its images"),
    ):
        path = npz_of(tmp_path / "x.npz", **statistics, **({"size": [size, size]} if size else {}))
        found = MeanColours(), reference_of(path, tmp_path)
        monkeypatch.setattr(measuring, "yardstick", lambda *args, found=found: found)
        if size:
            with pytest.raises(UserError, match=words):
                measuring.training_evaluation(cfg, UNKNOWN)
        else:
            measure = measuring.training_evaluation(cfg, UNKNOWN)
            with pytest.warns(UserWarning, match=f"{words}.*; the samples have 8 x 8"):
                assert measure(build_model(cfg), 5).keys() == {"fid", "is"}


def test_a_runs_own_evaluation_draws_the_classes_that_the_model_saw(tmp_path, monkeypatch):
    """Of the ten that the model has room for, the data had two."""
    cfg = load_config(DIGITS, ["evaluate.every=5", "evaluate.samples=20", "model.embed_dim=32", "model.depth=2"])
    found = MeanColours(), reference_of(npz_of(tmp_path / "x.npz", mu=np.zeros(3), sigma=np.eye(3)), tmp_path)
    monkeypatch.setattr(measuring, "yardstick", lambda *args: found)
    sample, drawn = measuring.sample, set()

    def seen(*args, labels, **options):
        drawn.update(labels.tolist())
        return sample(*args, labels=labels, **options)

    monkeypatch.setattr(measuring, "sample", seen)
    measuring.training_evaluation(cfg, Provenance(("ant", "bee")))(build_model(cfg), 5)
    assert drawn == {0, 1}


def test_statistics_of_classes_are_not_taken_for_those_of_other_images():
    """Where folders change their images' labels and not the images or their order."""
    images = Images("x", 3, lambda parts: iter(()), lambda: "the same")
    names = Provenance(("ant", "bee"))
    before, after = (
        measuring.of_classes(images, np.array(labels), names, [0], names) for labels in ([0, 0, 1], [0, 1, 1])
    )
    assert (before.count, after.count) == (2, 1) and before.identity() != after.identity()


def test_samples_that_are_nan_are_refused(run_with_classifier, checkpoint, capsys):
    path = checkpoint[3]
    state = build_model(load_config(DIGITS, checkpoint[5::2])).state_dict()
    save_file({name: value * 1e30 for name, value in state.items()}, path)
    capsys.readouterr()
    assert run_with_classifier("--reference", DIGITS, "--features", "digits-fid", *checkpoint, "--num", 4) == 2
    assert "samples 0 to 3 hold NaN or infinity" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--reference", "x.npz"], "either --samples, or --checkpoint"),
        (["--reference", "x.npz", "--samples", "a", "--config", DIGITS, "--checkpoint", "b"], "either --samples"),
        (["--reference", "FILE", "--config", DIGITS], "either --samples, or --checkpoint"),
        (["--reference", "FILE", "--samples", "nowhere"], "nowhere: no such file or folder"),
        (["--reference", "x.npz", "--samples", "FILE", "--inception", "WEIGHTS"], "x.npz: no such file or folder"),
        (["--reference", "FILE", "--samples", "FILE", "--inception", "x.pth"], "x.pth: no such Inception weight file"),
        (["--reference", "FILE", "--samples", "FILE", "--features", "digits-fid"], "a YAML whose data have labels"),
        (["--reference", "configs/h2_256.yaml", "--samples", "FILE"], "expected data of images, got latents"),
        (
            ["--reference", "FILE", "--samples", "FILE", "--precision", "fp8"],
            "--precision is of samples that are drawn",
        ),
        (
            ["--reference", "FILE", "--config", DIGITS, "--checkpoint", "WEIGHTS", "--precision", "fp8"],
            "its kernels need compute capability 9.0 (H100, H200), got no CUDA device",
        ),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_two(run, arguments, words, weights, tmp_path, capsys):
    places = {"FILE": images(tmp_path / "fake.npz", 5, 0), "WEIGHTS": weights}
    assert run(*[places.get(a, a) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("uvit-fast: ") and error.count("\n") == 1


def test_a_reference_may_be_a_configs_name_unless_something_is_called_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert reference_is_config("digits", "inception") and reference_is_config("x.yaml", "inception")
    assert not reference_is_config("digit", "digits-fid")
    (tmp_path / "digits").mkdir()  # as `sample --out digits` makes it
    assert not reference_is_config("digits", "inception")
    assert reference_is_config("digits", "digits-fid")  # which is of a config's data only
