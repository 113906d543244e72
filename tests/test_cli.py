"""The command line: one clear line for each mistake, and help that fits a screen."""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch

import uvit_fast
from tests.commands.small import DIGITS
from uvit_fast import cli
from uvit_fast.commands import hints
from uvit_fast.commands.arguments import Parser
from uvit_fast.config import reading


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sample", "--config", "configs/digit.yaml"], "did you mean configs/digits.yaml?"),
        (["sample", "--config", DIGITS, "--set", "model.dept=3"], "did you mean 'depth'?"),
        (
            ["sample", "--config", DIGITS, "--classes", "3,10"],
            "expected labels from 0 to 9, got 10",
        ),  # 10 is the null label
        (["sample", "--config", DIGITS, "--classes", "three"], "expected whole numbers"),
        (["sample", "--config", DIGITS, "--classes", ""], "expected whole numbers"),
        (["sample", "--config", DIGITS, "--cfg-scale", "nan"], "expected at least 1"),
        (["convert", "--config", DIGITS, "--checkpoint", DIGITS, "--out", "x.safetensors"], "expected a .pth file"),
        (["sample", "--config", "configs/s2_cifar10.yaml", "--classes", "3"], "trained with model.num_classes=0"),
        (["sample", "--config", DIGITS, "--cfg-scale", "0.4"], "expected at least 1"),
        (["sample", "--config", DIGITS, "--set", "sample.guidance_interval=[0.7, 0.2]"], "0 <= first <= last <= 1"),
        (["sample", "--config", "configs/l4_64.yaml", "--cfg-scale", "1.4"], "without dropping its condition"),
        (["sample", "--config", "configs/s2_cifar10.yaml", "--cfg-scale", "2"], "got 1, which is --cfg-scale 2"),
        (["sample", "--config", DIGITS, "--prompt", "a cat"], "takes classes, not text; expected no prompt"),
        (["sample", "--config", "configs/s2_cifar10.yaml", "--prompt", "a cat"], "takes no condition, not text"),
        (["sample", "--config", "configs/s2_coco.yaml"], "takes text; expected --prompt or --prompts"),
        (["sample", "--config", "configs/s2_coco.yaml", "--prompt", "a", "--prompts", "b"], "expected one of them"),
        (["sample", "--config", "configs/s2_coco.yaml", "--prompts", "no.txt"], "expected a text file"),
        (["sample", "--config", "configs/s2_coco.yaml", "--prompts", os.devnull], "got an empty file"),
        (["sample", "--config", "configs/s2_coco.yaml", "--prompt", "a", "--classes", "3"], "not class-conditional"),
        (
            ["sample", "--config", DIGITS, "--format", "png", "--out", "x.npz"],
            "expected --out to name a folder or a .png",
        ),
        (["sample", "--config", DIGITS, "--set", "device=cuda"], "no CUDA device was found"),
        (
            ["sample", "--config", DIGITS, "--precision", "fp8"],
            "sample.precision=fp8: its kernels need compute capability 9.0 (H100, H200), got no CUDA device; the",
        ),
        (
            ["sample", "--config", "configs/unet_adm_256.yaml", "--precision", "fp8"],
            "sample.precision=fp8: its kernels are U-ViT's, unet_adm_256 is a U-Net; expected bf16",
        ),
        (["sample", "--config", DIGITS, "--checkpoint", "x.pth"], "--checkpoint x.pth: no such file or folder"),
        (["sample", "--config", DIGITS, "--checkpoint", "x" * 5000], "xxx…: no such file or folder"),
        (["sample", "--config", "x" * 5000], "expected a config file (File name too long)"),
        (["evaluate", "--samples", "x.npz", "--reference", DIGITS], "--samples x.npz: no such file or folder"),
        (["evaluate", "--samples", DIGITS, "--reference", "x.npz"], "--reference x.npz: no such file or folder"),
        (
            ["sample", "--config", DIGITS, "--checkpoint", "configs"],
            "configs: no EMA weights, but ablations, custom.yaml, ",
        ),
        (["demo", "--run-dir", "configs"], "configs: no run"),
        (["sweep", "--config", "digits", "--out", DIGITS], f"{DIGITS}: expected a folder, got a file"),
        (
            ["cka", "--config", "configs/unet_adm_256.yaml", "--checkpoint", DIGITS, "--out", "x"],
            "expected a U-ViT, whose",
        ),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_two(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if arguments[0] == "sample":
        arguments = [
            *arguments,
            *([] if "--checkpoint" in arguments else ["--checkpoint", DIGITS]),
            *([] if "--out" in arguments else ["--out", str(tmp_path)]),
        ]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("uvit-fast: ") and error.count("\n") == 1


TYPOS = [
    (["--version"], 0, [f"uvit-fast {uvit_fast.__version__}"]),
    (["smaple"], 2, ["uvit-fast: smaple: no such command; did you mean sample?"]),
    ([], 2, ["uvit-fast: expected one of train, sample, ", "; example: uvit-fast sample --help"]),
    (["sample", "--out", "x", "--nme", "3"], 2, ["uvit-fast: sample: --nme: no such option; did you mean --num?"]),
    (["sample", "--out", "x"], 2, ["uvit-fast: sample: expected --checkpoint; example: uvit-fast sample --check"]),
    (["info", "x"], 2, ["uvit-fast: info: x: not an option, nor the value of one; example: uvit-fast info"]),
    (["data", "check", "--folder", "x"], 2, ["uvit-fast: data check: --folder: no such option"]),
    (
        ["train", "--config", "h2_255"],
        2,
        ["uvit-fast: h2_255: no such config file; did you mean h2_256 or l2_256?"],
    ),
    (["sample", "--checkpoint", "x.pth", "--out", "x"], 2, ["x.pth: no such file or folder"]),
    (["sample", "--checkpoint", DIGITS, "--out", "x", "--config", DIGITS, "--set", "trian.lr=1"], 2, ["'train'"]),
    (["sample", "--checkpoint", DIGITS, "--out", "x", "--config", DIGITS, "--prompt", "x"], 2, ["takes classes"]),
    (["evaluate", "--samples", "x.npz", "--reference", DIGITS], 2, ["x.npz: no such file or folder"]),
    (["info", "--config", "configs/digit.yaml"], 2, ["did you mean configs/digits.yaml?"]),
]
WITHOUT_TORCH = """
import contextlib, io, json, sys
sys.modules["torch"] = None
from uvit_fast.cli import main
for arguments in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, said.getvalue()]))
"""


@pytest.fixture(scope="module")
def answered():
    """Each typo's exit code and what was said, in one process that has no torch."""
    given = json.dumps([arguments for arguments, _, _ in TYPOS])
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("number", range(len(TYPOS)), ids=[" ".join(arguments) for arguments, _, _ in TYPOS])
def test_typos_are_answered_before_torch_is_imported(number, answered):
    """In one line; an unknown option before a missing one."""
    _, expected, words = TYPOS[number]
    code, said = answered[number]
    assert code == expected, said
    assert said.count("\n") == 1
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        ("train --resume x", "expected none: the same command continues from the newest checkpoint"),
        ("train --lr 1", "did you mean --set train.lr=...?"),
        ("train --batch_size 8", "did you mean --set train.batch_size=...?"),
        ("train --epochs 8", "did you mean --set train.iterations=...?"),
        ("train --run_dir x", "did you mean --run-dir?"),
        ("train --device cpu", "did you mean --set device=...?"),
        ("train --model h2_256", "did you mean --config?"),
        ("train --steps 8", "did you mean --set sample.steps=... or --set train.iterations=...?"),
        ("sample --model x", "did you mean --checkpoint?"),
        ("sample --ckpt x", "did you mean --checkpoint?"),
        ("sample --sampler euler", "did you mean --set sample.sampler=...?"),
        ("sample --batch-size 8", "did you mean --batch?"),
        ("sample --sede 8", "did you mean --seed?"),
        ("sample --lr 1", "example: uvit-fast sample"),
        ("--config digits", "expected a command first; example: uvit-fast sample"),
        ("-v x", "did you mean --version?"),
        ("train --hlep", "example: uvit-fast train"),
        ("train --frish", "example: uvit-fast train"),  # destructive: not by likeness
    ],
)
def test_an_option_of_elsewhere_is_told_what_does_it_here(arguments, meant, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments.split())
    option = next(word for word in arguments.split() if word.startswith("-"))
    assert f"{option}: no such option; {meant}" in capsys.readouterr().err


def test_the_names_from_elsewhere_are_not_ours_and_lead_to_what_there_is():
    parsers = [Parser(prog="x", example="x") for _ in cli.COMMANDS]
    for parser, command in zip(parsers, cli.COMMANDS.values()):
        command.arguments(parser)
    options = {"--version"} | {option for parser in parsers for option in parser._option_string_actions}
    assert {option for meant in hints.CALLED_HERE.values() for option in meant} <= options
    for name, key in reading.CALLED_HERE.items():
        section, _, leaf = key.rpartition(".")
        assert leaf in reading._fields_at(tuple(filter(None, [section]))) and name != leaf


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num", "0"], "uvit-fast: sample: --num: expected a whole number of at least 1, got '0'\n"),
        (["--seed=-1"], "uvit-fast: sample: --seed: expected a whole number from 0 to 2^63 - 1, got '-1'\n"),
        (["--cfg-scale", "x\ny"], "uvit-fast: sample: --cfg-scale: expected a number, got 'x\\ny'\n"),
        (["--precision", "fp9"], "uvit-fast: sample: --precision: expected bf16 or fp8, got 'fp9'\n"),
        (["--resume=3"], "uvit-fast: sample: --resume: expected no value, got '3'\n"),
    ],
)
def test_a_value_that_an_option_does_not_take_is_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["sample", "--checkpoint", "x", "--out", "x", *arguments])
    assert stop.value.code == 2 and capsys.readouterr().err == words


HELP = [[name] for name in cli.COMMANDS if name != "data"] + [[], ["data"], ["data", "check"], ["data", "cifar10"]]


@pytest.mark.parametrize("command", HELP, ids=" ".join)
def test_help_fits_a_screen_and_shows_an_example_that_the_parser_takes(command, capsys, monkeypatch):
    """Of 80 columns and 36 lines; options stand in groups that say what they are of."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main([*command, "--help"])
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert len(lines) <= 36 and max(map(len, lines)) <= 80
    assert not command or "options:" not in lines
    names = {(): cli.COMMANDS, ("data",): ("cifar10", "check")}.get(tuple(command), ())
    assert all(re.search(rf"^  {name} +\w", text, re.MULTILINE) for name in names)  # what it does, on the same line
    example = re.sub(r" \\\n +", " ", text.split("example:\n")[1]).splitlines()[0].removeprefix("  uvit-fast ")
    with monkeypatch.context() as patch, contextlib.suppress(SystemExit):  # the first one's example is a --help
        patch.setattr(cli, "_run", lambda args, *_: args.command)
        assert cli.main(shlex.split(example)) == (command or ["sample"])[0]
    assert not capsys.readouterr().err


@pytest.mark.parametrize("given, policy", [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_that_wait_sleep_unless_the_user_says_otherwise(given, policy):
    """In a process that is a command's, and before torch is there, which reads it once."""
    script = "import os, sys; from uvit_fast import cli; from uvit_fast.commands import info; sys.argv[1:] = ['info']; "
    script += "info.run = lambda args: print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules); cli.main()"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": given} if given else {}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [policy, "False"], done.stderr


def test_info_says_what_would_run_and_why(capsys):
    assert cli.main(["info", "--config", "configs/h2_256.yaml"]) == 0
    out = capsys.readouterr().out
    assert f"torch         {torch.__version__}" in out
    for line in ("16 heads of 72", "attention", "ln_mlp", "skip_linear"):
        assert line in out
