"""Whose a run's folder is, and what it says about the run."""

import json
import os
import platform
import re
from types import SimpleNamespace

import torch
from PIL import Image

from tests.training import tiny
from uvit_fast import build_dataset, provenance
from uvit_fast.cli import main
from uvit_fast.config import load_config
from uvit_fast.runtime.claims import Claim
from uvit_fast.runtime.errors import UserError
from uvit_fast.training.folder import run_states, summary


def test_a_folder_has_one_trainer(tmp_path):
    """Another process is refused, with the holder's name, and gets it once the first lets go."""
    claim = Claim(tmp_path)
    node = re.escape(platform.node())
    words = rf"another process trains here, pid {os.getpid()} on {node}, since 20\d\d-.*; --run-dir takes"
    assert re.search(words, tiny.launch(refusal, tmp_path))
    claim.release()
    assert tiny.launch(refusal, tmp_path) == ""


def refusal(run_dir) -> str:
    try:
        tiny.trainer(run_dir, tiny.config())
    except UserError as error:
        return str(error)
    return ""


def seen_while_training(run_dir, cfg):
    trainer, states = tiny.trainer(run_dir, cfg), []
    step = trainer._step

    def watched(stream):
        step(stream)
        states.append(probe(run_dir.parent))

    trainer._step = watched
    trainer.train()
    return states


def probe(folder) -> str:
    """As another process sees it: locks are a process's, and closing any file of it would give them up."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.write(writer, run_states(folder)[0].state.encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        return answer.read()


def test_runs_lists_what_runs_what_stopped_and_what_ended(tmp_path, capsys):
    cfg = tiny.config(iterations=4, checkpoint_every=2)
    assert tiny.launch(seen_while_training, tmp_path / "a", cfg) == ["running"] * 4
    tiny.launch(tiny.train, tmp_path / "b", tiny.config(iterations=2))
    config = tmp_path / "b" / "config.yaml"
    config.write_text(config.read_text().replace("iterations: 2", "iterations: 20"))
    assert main(["runs", str(tmp_path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:3] for line in lines[1:]] == [["b", "stopped", "2/20"], ["a", "finished", "4/4"]]
    assert [path.name for path in tmp_path.glob("*/.lock")] == [".lock"] * 2
    (tmp_path / "b" / ".lock").unlink()
    assert run_states(tmp_path)[0].state == "stopped"
    assert not (tmp_path / "b" / ".lock").exists()  # looking leaves nothing
    with open(tmp_path / "a" / "metrics.jsonl", "ab") as file:
        file.write(b"\0\0\n")  # a power cut
    (tmp_path / "b" / "config.yaml").write_text("")
    assert main(["runs", str(tmp_path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:3] for line in lines[1:]] == [["a", "finished", "4/4"], ["b", "unreadable", "0/0"]]
    assert main(["runs", str(tmp_path / "a")]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["run", "a"]
    assert main(["runs", str(tmp_path / "a" / "checkpoints")]) == 2
    assert "no runs" in capsys.readouterr().err


class Folders(tiny.Points):
    """Two images in each of twelve folders."""

    classes = tuple(f"kind{i}" for i in range(12))

    def __len__(self):
        return 24


def test_a_run_begins_by_naming_its_labels():
    """Which folder became which label is what a user asks for when sampling."""
    cfg = load_config("configs/custom.yaml", ["model.num_classes=13"])
    world = SimpleNamespace(device=torch.device("cpu"), size=1)
    dataset = Folders()
    text = summary(cfg, torch.nn.Linear(500, 1000), dataset, world)
    assert text.startswith("custom: 0.5 M parameters, 24 images, 1 x CPU")
    assert "\nlabels          0 kind0, 1 kind1, " in text and text.endswith(" 9 kind9, ... 12 classes")


def test_a_run_without_classes_says_which_folders_could_be_some(tmp_path):
    """Else a user meets it when sampling, hours later. Images beside the folders: these are no classes."""
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
    cfg = load_config("configs/custom.yaml", {"data.path": str(tmp_path), "model.img_size": 8})
    world = SimpleNamespace(device=torch.device("cpu"), size=1)
    line = "labels          none; model.num_classes=2 would take the 2 folders as classes"
    assert line in summary(cfg, torch.nn.Linear(1, 1), build_dataset(cfg), world)
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    assert "labels" not in summary(cfg, torch.nn.Linear(1, 1), build_dataset(cfg), world)


def test_a_run_begins_by_counting_images_as_an_extraction_does():
    """Not items: latents hold each image's mirror image too, and some images may be held out."""
    cfg = load_config("configs/custom.yaml", ["evaluate.held_out=8", "evaluate.every=2"])
    world = SimpleNamespace(device=torch.device("cpu"), size=1)
    latents = type("Latents", (Folders,), {"views": 2})()
    text = summary(cfg, torch.nn.Linear(500, 1000), latents, world)
    assert text.startswith("custom: 0.5 M parameters, 12 images and their mirror images (8 more held out), 1 x CPU")


def continued_with(run_dir, *lists) -> list[str]:
    """What a run says when it is started with one list of classes after the other."""
    said = []
    for number, classes in enumerate(lists, 1):
        try:
            tiny.trainer(run_dir, tiny.config(iterations=number), classes=classes).train()
        except UserError as error:
            said.append(str(error))
    return said


def test_classes_belong_to_the_run(tmp_path):
    """Another list would give labels another meaning;
    a run from before lists were kept takes the first that it meets.
    """
    old, known, moved = (), ("ant", "bee", "cat"), ("bee", "cat", "dog")
    (refusal,) = tiny.launch(continued_with, tmp_path / "run", old, known, known, moved)
    assert "removed ant; added dog; label 0 was ant, now bee" in refusal and "--run-dir" in refusal
    assert provenance.read(tmp_path / "run" / "checkpoints" / "step_00000003" / "ema.safetensors").classes == known
    assert json.loads((tmp_path / "run" / "data.json").read_text())["classes"] == list(known)
