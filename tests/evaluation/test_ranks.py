"""`uvit-fast evaluate` by several processes: the figures of one, written once; one error for all of them."""

import contextlib
import json
import shutil

import pytest
import torch
from PIL import Image

from tests.evaluation.test_evaluate_command import DIGITS, checkpoint  # noqa: F401 - a fixture
from tests.evaluation.test_features import folder_of, pictures
from tests.evaluation.test_metrics import statistics_of
from tests.training.tiny import launch
from uvit_fast import cli
from uvit_fast.evaluation.metrics import RunningStatistics
from uvit_fast.runtime.processes import World

COMMON = ["evaluate", "--device", "cpu", "--features", "digits-fid", "--reference", DIGITS]


def command(folder, *arguments):
    """In a rank: the exit code and what was said, into a file of the rank's own."""
    rank = World().rank
    with open(folder / f"rank_{rank}", "w") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = cli.main([*map(str, arguments)])
        except SystemExit as end:
            code = end.code
    (folder / f"code_{rank}").write_text(str(code))


def together(folder, *arguments):
    """The codes and the words of two ranks."""
    folder.mkdir()
    launch(command, folder, *arguments, ranks=2)
    return [(folder / f"code_{r}").read_text() for r in (0, 1)], [(folder / f"rank_{r}").read_text() for r in (0, 1)]


def test_two_processes_find_the_figures_of_one(checkpoint, digits_classifier, tmp_path):  # noqa: F811
    """Of drawn samples, and of their files in a single batch, of which the second process has none. A new cache: the
    real images are divided, too."""
    alone, shared, pngs = tmp_path / "alone", tmp_path / "shared", tmp_path / "pngs"
    for cache in (alone, shared):
        cache.mkdir()
        shutil.copy(digits_classifier, cache)
    drawn = [*checkpoint, "--num", 70, "--batch", 16]
    read = ["--samples", pngs, "--batch", 100]
    arguments = [*COMMON, "--cache", alone, *drawn, "--save-images", pngs, "--out", tmp_path / "drawn.json"]
    assert cli.main([*map(str, arguments)]) == 0
    assert cli.main([*map(str, [*COMMON, "--cache", alone, *read, "--out", tmp_path / "read.json"])]) == 0
    for name, source in {"drawn": drawn, "read": read}.items():
        out = tmp_path / f"{name}2.json"
        codes, (first, second) = together(tmp_path / name, *COMMON, "--cache", shared, *source, "--out", out)
        assert codes == ["0", "0"], first + second
        assert "digits-recall" in first and not second
        # 1e-7: the root of rounding, from eigenvalues that are zero
        one, two = (json.loads(path.read_text()) for path in (tmp_path / f"{name}.json", out))
        assert two["metrics"] == pytest.approx(one.pop("metrics"), rel=1e-7) and two["num_samples"] == 70
        assert {key: two[key] for key in one} == one
    assert {path.name for path in shared.iterdir()} == {path.name for path in alone.iterdir()}


def test_a_failure_of_one_process_is_the_jobs_only_error(digits_classifier, tmp_path, capfd):
    """Images of another size, at which the second process arrives, or the first, with which the others lose their
    meeting point; a reference that no process finds. Nor does torch complain."""
    folders = [folder_of(pictures(40), tmp_path / name) for name in ("a", "b")]
    for number, folder in zip((3, 5), folders):
        Image.new("RGB", (9, 8)).save(folder / f"{number:04d}.png")
    (tmp_path / "cache").mkdir()
    shutil.copy(digits_classifier, tmp_path / "cache")
    common = [*COMMON, "--cache", tmp_path / "cache", "--batch", 2]
    for name, arguments, words in (
        ("second", ["--samples", folders[0]], "0003.png: expected 8 x 8 pixels"),
        ("first", ["--samples", folders[1]], "0005.png: expected 8 x 8 pixels"),
        ("both", ["--samples", folders[0], "--set", "data.name=synthetic"], "expected data of images, got synthetic"),
    ):
        codes, said = together(tmp_path / name, *common, *arguments)
        assert codes == ["2", "2"]
        errors = [line for output in said for line in output.splitlines() if line.startswith("uvit-fast: ")]
        assert len(errors) == 1 and words in errors[0], said
        assert "Traceback" not in "".join(said)
    assert "TCPStore" not in capfd.readouterr().err


def test_statistics_of_two_shares_are_those_of_the_whole():
    x = torch.randn(50, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e4
    shares = []
    for rows in (x[:0], x[:13], x[13:]):
        shares.append(RunningStatistics(5))
        shares[-1].update(rows)
    for other in shares[1:]:
        shares[0].merge(other)
    for found, expected in zip(shares[0].statistics(), statistics_of(x)):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
