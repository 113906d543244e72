"""The docs: pages whose links hold, lines that fit, a site whose pages exist; hooks and templates that name what there
is.
"""

import ast
import builtins
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel

from uvit_fast.config import Config

ROOT = Path(__file__).parent.parent
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "examples" / "README.md"])
NAV = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_names_of_files_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    for path in re.findall(r"`((?:tests|kernels|uvit_fast|examples|tools)/[\w/]+\.(?:py|md|sh|yaml))`", text):
        assert (ROOT / path).exists(), path


def keys(section: type, prefix: str = "") -> set[str]:
    """The keys of the schema, train.lr and so on."""
    found = set()
    for name, field in section.model_fields.items():
        found.add(prefix + name)
        kinds = [field.annotation, *get_args(field.annotation)]
        for kind in [*kinds, *(inner for each in kinds for inner in get_args(each))]:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found |= keys(kind, f"{prefix}{name}.")
    return found


KEYS = keys(Config)
SECTIONS = "|".join({key.partition(".")[0] for key in KEYS if "." in key})
OTHERS = {"model.cuda_graphs", "train.py", "data.csv", "data.json"}  # an attribute, files


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_a_page_names_keys_of_configs_that_there_are(page):
    named = set(re.findall(rf"(?:`|--set )((?:{SECTIONS})\.\w+)", page.read_text()))
    assert named - KEYS - OTHERS == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_lines_have_at_most_120_characters(page):
    assert [line for line in page.read_text().splitlines() if len(line) > 120] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_the_reference_shows_is_there(page):
    """A name that griffe does not find is an error of `make docs`; here of the tests too, by the sources alone."""
    for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE):
        module = ROOT / name.replace(".", "/")
        if not module.with_suffix(".py").is_file() and not (module / "__init__.py").is_file():
            parent, _, last = name.rpartition(".")
            file = ROOT / (parent.replace(".", "/") + ".py")
            source = (file if file.is_file() else ROOT / parent.replace(".", "/") / "__init__.py").read_text()
            assert re.search(rf"\b{last}\b", source), name


def test_every_page_stands_in_the_sites_list():
    for page in (ROOT / "docs").rglob("*.md"):
        assert page.relative_to(ROOT / "docs").as_posix() in NAV, f"{page}: add it to mkdocs.yml"


def test_the_site_is_built_without_a_warning(tmp_path):
    """Where the extra docs is installed, which CI's tests do without."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    build = [sys.executable, "-m", "mkdocs", "build", "-d", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING -" not in done.stderr, done.stderr
    page = (tmp_path / "site" / "api" / "model.html").read_text()
    assert "The noise prediction network" in page and (tmp_path / "site" / "kernels" / "LOG.html").is_file()


def test_the_hook_before_a_commit_is_lints_ruff():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    pinned = re.search(r"^ruff==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert [repo["rev"] for repo in hooks] == [f"v{pinned}"]


def test_make_help_lists_every_target_that_is_meant_to_be_called():
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    done = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert {name for name, _ in lines} == set(phony)


SNIPPETS = [
    (page, number, snippet)
    for page in [ROOT / "README.md", *PAGES]
    for number, snippet in enumerate(re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE))
]


@pytest.mark.parametrize("page, number, snippet", SNIPPETS, ids=[f"{p.stem}-{n}" for p, n, _ in SNIPPETS])
def test_a_snippet_can_be_pasted_as_it_stands(page, number, snippet):
    """It imports or defines what it uses; what it imports is there."""
    names = [node for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Name)]
    bound = {node.id for node in names if isinstance(node.ctx, ast.Store)} | set(dir(builtins))
    for node in ast.walk(ast.parse(snippet)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            bound |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("uvit_fast"):
            for alias in node.names:
                if not hasattr(importlib.import_module(node.module), alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
    assert {node.id for node in names if isinstance(node.ctx, ast.Load)} - bound == set()


def test_a_command_of_pip_takes_the_tested_versions():
    """Without constraints.txt an editable installation takes others, such as a torch that nobody has tried."""
    for page in [ROOT / "README.md", *PAGES]:
        for what, versions in re.findall(r"pip install -e (\S+)(\s+-c\s+constraints\.txt)?", page.read_text()):
            assert versions, f"{page}: pip install -e {what}"


EXTRAS = {  # a command, by what it begins with -> the extra that it needs
    "convert": "diffusers", "extract": "diffusers", "gallery": "gallery", "front": "plot", "sweep": "plot",
    "cka": "plot", "runs --plot": "plot",
}  # fmt: skip


def test_a_page_names_the_extras_that_its_commands_need():
    for page in [ROOT / "README.md", *PAGES]:
        found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
        blocks = "".join(block for language, block in found if not language)
        for command, extra in EXTRAS.items():
            if re.search(rf"uvit-fast {command}\b", blocks):
                named = re.search(rf'pip install -e "\.\[[\w,]*\b{extra}\b', page.read_text()) is not None
                assert named, f"{page}: {command} needs {extra}"
