"""The names of classes: where they are kept, how a user writes them, and how two lists differ."""

import json

import pytest

from uvit_fast.config import load_config
from uvit_fast.provenance import Provenance, classes_difference, read, same_encoder, shown
from uvit_fast.runtime.errors import UserError
from uvit_fast.sampling.weights import provenance_of

ANIMALS = Provenance(("ant", "tench, Tinca tinca", "bee", "über", "火车"))
NUMBERED = Provenance(("0", "2", "1", "10"))  # folders, as somebody might name them


@pytest.mark.parametrize(
    "known, text, labels",
    [
        (ANIMALS, "bee,ant", [2, 0]),
        (ANIMALS, "2,0,ant", [2, 0, 0]),
        (ANIMALS, "ant,tench, Tinca tinca,bee", [0, 1, 2]),  # names hold commas, as ImageNet's do
        (ANIMALS, " bee , u\u0308ber,火车", [2, 3, 4]),  # accents as macOS writes them
        (
            Provenance(("e\u0301", "\u00e9")),
            "\u00e9,e\u0301",
            [1, 0],
        ),  # two folders on a file system that tells them apart
        (Provenance(), "3, 7", [3, 7]),
        (NUMBERED, "0,10", [0, 3]),  # the same as the label, and no label at all
        (NUMBERED, "label:1,name:1", [1, 2]),
        (Provenance(("label:1", "b")), "label:1", [0]),
        (ANIMALS, "-1", [-1]),  # for check_labels to refuse
    ],
)
def test_classes_are_named_or_numbered(known, text, labels):
    assert known.labels(text, 4) == labels


@pytest.mark.parametrize(
    "known, text, words",
    [
        (ANIMALS, "bees", "did you mean bee"),
        (ANIMALS, "zzz", "expected whole numbers, or names: ant, tench"),
        (ANIMALS, "", "expected whole numbers"),
        (Provenance(), "ant", "no names are known"),
        (NUMBERED, "1", "label 1, 2, and the name of label 2; expected label:1 or name:1"),
    ],
)
def test_a_name_that_is_none_or_two_is_refused(known, text, words):
    with pytest.raises(UserError, match=words):
        known.labels(text, 4)


@pytest.mark.parametrize(
    "before, now, words",
    [
        ("ant cat", "ant bee cat", "2 classes, now 3; added bee; label 1 was cat, now bee"),
        ("ant bee cat", "bee cat", "3 classes, now 2; removed ant; label 0 was ant, now bee"),
        ("ant bee cat", "bee cat red_ant", "removed ant; added red_ant; label 0 was ant, now bee"),
        ("ant bee", "ant bee cat", "2 classes, now 3; added cat"),
        ("ant bee", "bee ant", "label 0 was ant, now bee"),
    ],
)
def test_a_difference_names_what_moved(before, now, words):
    assert classes_difference(before.split(), now.split()) == words


def test_what_is_not_known_agrees_and_is_filled_in():
    vae = {"vae": {"name": "a", "encoder_sha256": "1" * 64}}
    old, new = Provenance(), Provenance(("ant",), vae)
    assert old.difference(new) is new.difference(old) is None and old.joined(new) == new.joined(old) == new
    other = Provenance(("ant",), {"vae": {"name": "b", "encoder_sha256": "2" * 64}})
    assert new.difference(other) == "another autoencoder: a (11111111), now b (22222222)"


def test_encoders_are_the_same_where_a_checksum_agrees():
    one = {"name": "a", "sha256": "1", "float16_sha256": "h"}
    assert same_encoder(one, {"name": "copy in fp16", "sha256": "2", "float16_sha256": "h"})
    assert not same_encoder(one, {"name": "a", "sha256": "2"})
    assert same_encoder(one, {"name": "b"})  # nobody looked


def test_it_is_found_beside_weights_of_every_kind(tmp_path):
    run, names = tmp_path / "run", Provenance(("ant", "bee"))
    step = run / "checkpoints" / "step_00000001"
    step.mkdir(parents=True)
    assert read(step / "ema.safetensors") == Provenance()
    names.write(run / "data.json")
    assert read(step / "ema.safetensors") == read(run / "best" / "ema.safetensors") == names
    (step / "manifest.json").write_text(json.dumps({"data": {"classes": ["cat"]}}))
    assert read(step / "ema.safetensors").classes == ("cat",)
    names.write(tmp_path / "published.data.json")
    assert read(tmp_path / "published.pth") == names and read(tmp_path / "other.pth") == Provenance()
    (tmp_path / "other.data.json").write_text('{"classes": "ant"}')
    with pytest.warns(UserWarning, match=r"other.data.json: damaged"):
        assert read(tmp_path / "other.pth") == Provenance()


def test_weights_are_taken_for_nothing_else_than_they_were_trained_on(tmp_path):
    """A network's output looks alike whatever it predicts. What was written before that was kept agrees with every
    config.
    """
    cfg = load_config("configs/digits_eps.yaml", ["diffusion.prediction=v"])
    known = Provenance(diffusion=cfg.diffusion.meaning)
    known.write(tmp_path / "x.data.json")
    assert provenance_of(cfg, tmp_path / "x.pth").diffusion == {"schedule": "vp", "prediction": "v"}
    with pytest.raises(
        UserError,
        match=r"x.pth: trained with .*prediction v, but digits\w* has eps; expected .*=v$",
    ):
        provenance_of(load_config("configs/digits_eps.yaml"), tmp_path / "x.pth")
    (tmp_path / "x.data.json").write_text('{"classes": []}')
    assert provenance_of(cfg, tmp_path / "x.pth").diffusion == {}
    assert Provenance(("ant",)).joined(known).diffusion == known.diffusion


def test_names_are_shown_on_one_line_whatever_folders_are_called():
    assert shown(["a\nb", "\x1b[1m", "caf\udce9", "火车"]) == r"a\nb, \x1b[1m, caf\udce9, 火车"
    assert shown("abcdef", 2) == "a, b, ... 6 in all"
