"""`--checkpoint`: which weights and config a path means, and damaged ones."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from uvit_fast import cli, load_config, sampling
from uvit_fast.commands.arguments import config_of
from uvit_fast.config import dump_config
from uvit_fast.runtime.errors import UserError
from uvit_fast.training import checkpoint as checkpoints

from .small import DIGITS, SMALL, sample, save_checkpoint


def test_a_run_folder_brings_its_config(checkpoint, tmp_path, capsys):
    run = checkpoint.parents[2]
    assert cli.main(["sample", "--checkpoint", str(run), "--out", str(tmp_path / "out")]) == 2
    assert f"{run.name}: has no config.yaml or model_index.json; expected a run's" in capsys.readouterr().err
    (run / "config.yaml").write_text(dump_config(load_config(DIGITS, SMALL[1::2])))
    assert (
        cli.main(["sample", "--checkpoint", str(run), "--out", str(tmp_path / "own.npz"), "--num", "1", "--steps", "1"])
        == 0
    )
    assert sample(run, tmp_path / "named.npz", "--num", "1", "--steps", "1") == 0
    own, named = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("own", "named"))
    assert np.array_equal(own, named)


def test_a_file_without_a_config_says_what_is_missing(checkpoint, tmp_path):
    weights = shutil.copy(checkpoint, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="weights.safetensors: weights alone .* expected --config too"):
        config_of(None, str(weights), [])
    with pytest.raises(UserError, match=r"README.md: expected weights \(.pth, .*\), .* got another kind of file"):
        config_of(None, "README.md", [])


def test_a_checkpoint_brings_its_runs_config_and_alone_its_own(checkpoint, tmp_path):
    run, outs = checkpoint.parents[2], []
    (run / "config.yaml").write_text(dump_config(load_config(DIGITS, SMALL[1::2])))
    shutil.copytree(checkpoint.parent, run / "best")
    alone = shutil.copytree(checkpoint.parent, tmp_path / "elsewhere" / "step_00000010")
    for i, where in enumerate((run, checkpoint.parent, checkpoint, run / "best", alone, alone / "ema.safetensors")):
        outs.append(tmp_path / f"{i}.npz")
        assert (
            cli.main(["sample", "--checkpoint", str(where), "--out", str(outs[-1]), "--num", "1", "--steps", "1"]) == 0
        )
    images = [np.load(out)["arr_0"] for out in outs]
    assert all(np.array_equal(images[0], other) for other in images)


def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def link_to_nothing(file):
    file.unlink()
    file.symlink_to("nowhere")


def empty_the_folder(file):
    shutil.rmtree(file.parent)
    file.parent.mkdir()


@pytest.mark.parametrize("damage", [flip_a_bit, lambda file: file.unlink(), link_to_nothing, empty_the_folder])
@pytest.mark.parametrize("part", ["ema", "exp_avg"])
def test_the_newest_intact_checkpoint_is_the_one_that_training_continues_from(checkpoint, damage, part):
    """Whichever file is damaged, the whole checkpoint is passed over, by all and aloud."""
    folder, said = checkpoint.parents[1], []
    damage(save_checkpoint(folder, 20) / f"{part}.safetensors")
    with pytest.warns(UserWarning, match="step_00000020 is damaged"):
        found = sampling.find_weights(folder.parent)
    assert found == checkpoint == checkpoints.newest_intact(folder, said.append)[0] / "ema.safetensors"
    assert len(said) == 1 and sampling.find_weights(checkpoint.parent) == checkpoint


def test_a_copy_beside_the_checkpoints_is_nobodys_newest(checkpoint, recwarn):
    folder = checkpoint.parents[1]
    for name in ("step_best", "step_00000010.older", "step_99", "step_٠٠٠٠٠٠٩٩", "step_00000099_copy"):
        shutil.copytree(checkpoint.parent, folder / name)
    assert sampling.find_weights(folder.parent) == sampling.find_weights(folder) == checkpoint
    assert sampling.find_weights(folder / "step_best").parent.name == "step_best" and not recwarn.list
    for name in ("step_00000099", "step_00000098"):  # as training calls them
        shutil.copytree(checkpoint.parent, folder / name)
    with pytest.warns(UserWarning, match="manifest.json: of step 10, so this is a copy"):
        assert sampling.find_weights(folder.parent) == checkpoint
    assert checkpoints.newest_intact(folder, lambda text: None)[0] == checkpoint.parent


def test_a_checkpoint_that_was_named_is_taken_or_refused_not_replaced(checkpoint, tmp_path, capsys):
    """Other files' damage is said; the weights' own is an error, though there is an older checkpoint."""
    newer = save_checkpoint(checkpoint.parents[1], 20)
    flip_a_bit(newer / "exp_avg.safetensors")
    for name in (newer, newer / "ema.safetensors"):
        with pytest.warns(
            UserWarning, match=r"damaged \(exp_avg.safetensors: its SHA-256 .*ema.safetensors, which was asked"
        ):
            assert sampling.find_weights(name) == newer / "ema.safetensors"
    flip_a_bit(newer / "ema.safetensors")
    assert sample(newer, tmp_path / "out.npz", "--num", "1", "--steps", "1") == 2
    assert "ema.safetensors: damaged (its SHA-256" in capsys.readouterr().err
    link_to_nothing(newer / "ema.safetensors")
    assert sample(newer, tmp_path / "out.npz", "--num", "1", "--steps", "1") == 2
    assert "ema.safetensors: a link to nothing" in capsys.readouterr().err
    with pytest.raises(UserError, match="these are AdamW's moments"):
        sampling.find_weights(newer / "exp_avg.safetensors")


def test_a_manifest_can_neither_lie_about_a_file_nor_leave_its_folder(checkpoint, tmp_path):
    """A file that its own maker's manifest calls right, and a name that leads elsewhere."""
    manifest = checkpoint.with_name("manifest.json")
    whole, content = manifest.read_text(), json.loads(manifest.read_text())
    (tmp_path / "secret").write_bytes(b"secret")
    data = bytearray(checkpoint.read_bytes())
    data[:8] = (2**40).to_bytes(8, "little")  # the header's length
    checkpoint.write_bytes(data)
    content["files"]["ema.safetensors"]["sha256"] = hashlib.sha256(data).hexdigest()
    manifest.write_text(json.dumps(content))
    assert dict(checkpoints.faults(checkpoint.parent)).keys() == {"ema.safetensors"}
    for text in (
        whole.replace('"ema.safetensors"', '"../../../secret"'),
        whole.replace('"ema.safetensors"', f'"{tmp_path}/secret"'),
        "[" * 100_000,
        "9" * 100_000,
    ):
        manifest.write_text(text)
        assert dict(checkpoints.faults(checkpoint.parent)).keys() == {"manifest.json"}
