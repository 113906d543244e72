"""README's first screen and length; its figures, and those of docs/benchmarks.md, are the committed results'; the
commands of README and docs are ones that there are, and their files exist."""

import re
import shlex
from pathlib import Path

import pytest

from benchmarks import table
from benchmarks.results import Results
from uvit_fast import cli
from uvit_fast.config import load_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", table.TABLES, ids=lambda path: path.stem)
def test_the_table_is_what_the_results_say(path):
    assert path.read_text() == table.page(path), "run `python -m benchmarks.table`"


def test_the_first_screen_has_the_figures_the_samples_and_three_commands():
    lines = README.splitlines()
    screen = "\n".join(lines[:45])
    assert [line.split(" |")[0] for line in lines[:45] if re.match(r"\| [SMLH]/2 ", line)] == [
        f"| {s}/2" for s in "SMLH"
    ]
    assert "](docs/digits.png)" in screen and "](docs/fashion.png)" in screen
    assert [len(block.strip().splitlines()) for block in screen.split("```")[1::2]] == [3]


def test_readme_has_at_most_200_lines_of_at_most_120_characters():
    lines = README.splitlines()
    assert len(lines) <= 200
    assert [line for line in lines if len(line) > 120] == []


def test_the_overview_has_the_ratio_of_each_of_ours_to_the_best_peer(tmp_path):
    """Where FP8, or a peer, was not measured a dash says so; figures of one image are milliseconds of one."""
    rows = [
        ("500", "ours", 10),
        ("500", "ours-fp8", 8),
        ("500", "eager", 20),
        ("500", "torchao-fp8", 12),
        ("1", "ours", 50),
    ]
    head = "date,commit,device,torch,triton,question,case,provider,dtype,batch,metric,unit,p20,p50,p80"
    said = [f"d,c,GPU,t,t,sampling,H:{n}:nocfg:latent,{who},bf16,{n},time,s_per_500,0,{s},0" for n, who, s in rows]
    (tmp_path / "sampling.csv").write_text("\n".join([head, *said]))
    text = table.overview(Results(tmp_path))
    assert "| H/2 | 10.0 / 8.00 | 12.0 torchao-fp8 | 1.20× / 1.50× | 100 / – | – | – |" in text
    assert "| S/2 | – | – | – | – | – | – |" in text


def test_every_linked_file_exists():
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_are_ones_that_there_are(page, monkeypatch):
    """Options, configs and overrides are looked up; nothing is run."""
    monkeypatch.setattr(cli, "_run", lambda args, *rest: args)
    for command in commands_of(page.read_text()):
        name, *argv = command
        args = cli.script("train.py", "train", argv) if name == "train.py" else cli.main(argv)
        config = getattr(args, "config", None)
        if isinstance(config, str) and args.command != "sweep":
            load_config(config, getattr(args, "set", None) or ())


def commands_of(text: str) -> list[list[str]]:
    """The calls of train.py and of `uvit-fast` among a page's commands, without their launchers; `...` ends one."""
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        if language or not any(start in block for start in STARTS):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            at = next((i for i, word in enumerate(words) if word in STARTS), None)
            if at is not None and "..." not in words:
                found.append(words[at:])
    return found


STARTS = ("train.py", "uvit-fast", "uvit_fast.cli", "uvit_fast")


def test_readmes_commands_are_found():
    found = [" ".join(command[:2]) for command in commands_of(README)]
    assert {
        "uvit-fast sample",
        "uvit-fast train",
        "uvit-fast evaluate",
        "uvit-fast gallery",
        "train.py --config",
    } <= set(found)
    targets = re.findall(r"^make ([a-z-]+)", README, re.MULTILINE)
    assert targets and all(
        re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in targets
    )


def test_every_path_that_contributing_names_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = re.findall(r"(?:^|[\s`(])((?:tests|kernels|benchmarks|docs|uvit_fast)/[\w/.]*)", text)
    assert len(paths) > 20
    for path in paths:
        assert (ROOT / path.rstrip(".")).exists(), path
