"""A run with one checkpoint, for the tests of commands."""

import pytest

from .small import save_checkpoint


@pytest.fixture
def checkpoint(tmp_path):
    """The EMA weights of a run's only checkpoint."""
    path = tmp_path / "run" / "checkpoints" / "step_00000010" / "ema.safetensors"
    save_checkpoint(path.parents[1], 10)
    return path
