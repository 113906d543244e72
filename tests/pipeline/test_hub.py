"""A pipeline on the hub: what goes up, and what comes down again. A folder stands for the hub; nothing leaves the
machine.
"""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError

from tests.pipeline.test_pipeline import SMALL, latent_pipeline, seeded
from uvit_fast import build_model, cli, load_config
from uvit_fast.pipeline import UViTPipeline, make_pipeline

REPO = "someone/uvit-small"


class Hub:
    """The calls of huggingface_hub that diffusers makes, on a folder; the names are theirs."""

    def __init__(self, root: Path):
        self.root, self.commits = root, []

    def files(self, repo_id):
        folder = self.root / repo_id
        return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]

    def create_repo(self, repo_id, **_):
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, commit_message, path_in_repo=None, **_):
        shutil.copytree(folder_path, self.root / repo_id / (path_in_repo or ""), dirs_exist_ok=True)
        self.commits.append(commit_message)
        return f"https://hub/{repo_id}"

    def model_info(self, repo_id, **_):
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=f) for f in self.files(repo_id)], sha="0" * 40)

    def hf_hub_download(self, repo_id, filename, **_):
        if not (self.root / repo_id / filename).is_file():
            raise EntryNotFoundError(filename)
        return str(self.root / repo_id / filename)

    def snapshot_download(self, repo_id, **_):
        return str(self.root / repo_id)

    def card(self, repo_id, **_):
        return ModelCard(Path(self.hf_hub_download(repo_id, "README.md")).read_text())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub, utils = Hub(tmp_path / "hub"), "diffusers.utils"
    doors = {
        f"{utils}.hub_utils": ("create_repo", "upload_folder", "hf_hub_download", "model_info", "snapshot_download"),
        "diffusers.pipelines.pipeline_utils": ("create_repo", "hf_hub_download", "model_info", "snapshot_download"),
        f"{utils}.dynamic_modules_utils": ("hf_hub_download", "model_info"),
    }
    for module, names in doors.items():
        for name in names:
            monkeypatch.setattr(f"{module}.{name}", getattr(hub, name))
    monkeypatch.setattr(ModelCard, "load", hub.card)
    monkeypatch.setattr(f"{utils}.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return hub


@pytest.mark.parametrize("by", ["push_to_hub", "save_pretrained"])
def test_what_was_pushed_loads_by_its_name_and_has_its_own_card(hub, tmp_path, by):
    """Both of diffusers' ways; it would put a card of general words into an empty repository."""
    pipe = latent_pipeline(license="mit")
    if by == "push_to_hub":
        assert pipe.push_to_hub(REPO, commit_message="first") == f"https://hub/{REPO}"
    else:
        pipe.save_pretrained(str(tmp_path / "here"), push_to_hub=True, repo_id=REPO, commit_message="first")
    card = hub.card(REPO)
    assert hub.commits == ["first"] and card.data.license == "mit" and card.data.library_name == "diffusers"
    assert f'UViTPipeline.from_pretrained("{REPO}")' in card.content and "this/folder" not in card.content
    expected = pipe(3, generator=seeded(), output_type="pt").images
    loaded = [UViTPipeline.from_pretrained(REPO), DiffusionPipeline.from_pretrained(REPO, trust_remote_code=True)]
    for again in loaded:
        again.set_progress_bar_config(disable=True)
        assert type(again) is UViTPipeline and again.config.license == "mit"
        assert torch.equal(again(3, generator=seeded(), output_type="pt").images, expected)


def test_a_card_that_someone_wrote_stays(hub, tmp_path):
    """The hub's, as with diffusers; else the folder's."""
    pipe = latent_pipeline()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "README.md").write_text("---\nlicense: mit\n---\nmine")
    pipe.save_pretrained(str(tmp_path / "here"), push_to_hub=True, repo_id=REPO)
    assert hub.card(REPO).text.strip() == "mine"
    (hub.root / REPO / "README.md").write_text("---\nlicense: mit\n---\nthe hub's")
    pipe.push_to_hub(REPO)
    assert hub.card(REPO).text.strip() == "the hub's"


def test_the_card_says_what_the_licence_is_or_that_it_is_not_known(tmp_path, capsys):
    cfg = load_config("configs/digits.yaml", SMALL)
    torch.save(build_model(cfg).state_dict(), tmp_path / "x.pth")
    sets = [part for override in SMALL for part in ("--set", override)]
    convert = ["convert", "--config", "configs/digits.yaml", *sets, "--checkpoint", str(tmp_path / "x.pth")]
    assert cli.main([*convert, "--license", "cc-by-4.0", "--out", str(tmp_path / "pipe")]) == 0
    card = ModelCard((tmp_path / "pipe" / "README.md").read_text())
    assert card.data.license == "cc-by-4.0" and "Weights: cc-by-4.0." in card.text
    make_pipeline(cfg, build_model(cfg).state_dict()).save_pretrained(tmp_path / "unknown")
    card = ModelCard((tmp_path / "unknown" / "README.md").read_text())
    assert card.data.license is None and "Weights: please fill in" in card.text
    assert cli.main([*convert, "--license", "cc-by-4.0", "--out", str(tmp_path / "y.pth")]) == 2
    assert cli.main([*convert, "--license", "all rights", "--out", str(tmp_path / "y")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "expected a pipeline's folder, whose card names it" in lines[0] and "such as apache-2.0" in lines[1]
