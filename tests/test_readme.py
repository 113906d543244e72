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


def test_the_first_screen_has_the_samples_two_commands_for_everybody_and_the_figures():
    """In this order: what saves somebody without a GPU several GB stands before the command that would load them."""
    lines = README.splitlines()
    screen = "\n".join(lines[:45])
    first, own = screen.split("```")[1::2]
    order = ["](docs/digits.png)", "](docs/fashion.png)", first, own, *(f"| {s}/2 " for s in "SMLH")]
    places = [screen.index(part) for part in order]
    assert places == sorted(places)
    torch, demo, sample = (line.split(" #")[0].split() for line in first.strip().splitlines())
    assert torch[0] == "export" and torch[1].startswith("TORCH_INDEX=")
    assert demo == ["make", "demo"] and sample[:4] == [".venv/bin/uvit-fast", "sample", "--checkpoint", "runs/digits"]
    assert "--config custom_small" in own and "--config custom " in own  # on a CPU, on a GPU


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
    assert "| H/2 | 501 M | 10.0 s | 12.0 s, torchao-fp8 | 1.20× | 100 ms | – | – |" in text
    assert "| S/2 | 45 M | – | – | – | – | – | – |" in text
    assert "[FP8](docs/fp8.md): 500 images 1.50 times as fast as the best peer." in text


def test_fp8s_times_stand_beside_bf16s(tmp_path):
    """Those of a case that has FP8's."""
    rows = [
        ("H:500:cfg:latent", "ours", 23), ("H:500:cfg:latent", "ours-fp8", 11.5), ("H:1:nocfg:latent", "ours-fp8", 40),
        ("S:1:nocfg:latent", "ours", 10), ("forward:S:8", "ours", 0.7), ("forward:S:8", "ours-fp8", 0.5),
    ]  # fmt: skip
    head = "date,commit,device,torch,triton,question,case,provider,dtype,batch,metric,unit,p20,p50,p80"
    said = [f"d,c,GPU,t,t,sampling,{case},{who},bf16,1,time,s,0,{value},0" for case, who, value in rows]
    (tmp_path / "sampling.csv").write_text("\n".join([head, *said]))
    assert table.fp8(Results(tmp_path)).splitlines()[2:5] == [
        "| H/2, 500 images, guided, s | 23.0 | 11.5 | 2.00× |",
        "| H/2, one image, ms | – | 80.0 | – |",
        "| S/2, a plain call of 8 images, ms | 0.700 | 0.500 | 1.40× |",
    ]


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
