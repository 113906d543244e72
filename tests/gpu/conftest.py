"""GPUs run the kernels of their own architecture, and those of an A100 beside them."""

import os

import pytest

from uvit_fast.kernels.runtime import device


@pytest.fixture(params=["own", "sm80"])
def cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The card's own kernels, then plain Triton's, which run on sm_80 and on every later card; processes that a test
    starts too.
    """
    if request.param == "sm80":
        monkeypatch.setattr(device, "_FORCED", 80)
        monkeypatch.setitem(os.environ, "UVIT_FAST_ARCH", "80")
    return request.param
