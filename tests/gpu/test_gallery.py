"""The gallery on a GPU: captured loops, replayed with their states, in every precision that the card has."""

import numpy as np
import pytest
import torch

from tests.gallery.small import save_run
from uvit_fast import sampling
from uvit_fast.gallery.recipe import checked
from uvit_fast.gallery.session import FRAMES, Session
from uvit_fast.sampling.images import to_uint8

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("sampler", ["dpm_fast", "euler_maruyama"])
def test_replays_are_what_the_sampling_loop_draws_and_say_milliseconds(tmp_path, sampler):
    wide = ["model.embed_dim=256", "model.num_heads=4", f"sample.sampler={sampler}"]
    cfg, run = save_run(tmp_path / "run", *wide)
    session = Session({"run": (cfg, run)}, CUDA)
    choices = session.choices("run")
    hopper = torch.cuda.get_device_capability() == (9, 0)
    assert choices.precisions == (["bf16", "fp8"] if hopper else ["bf16"])
    for precision in choices.precisions:
        for seed in (1, 2):
            views = list(session.draw([checked(choices.start, label=3, seed=seed, precision=precision)]))
            assert len(views) == FRAMES and views[-1].replayed and 0 < views[-1].milliseconds < 1000
            model = sampling.load_for_sampling(session._sources["run"].config(sampler, precision), run, CUDA)
            (wanted,) = sampling.sample(model, cfg, 1, labels=torch.tensor([3]), seed=seed)
            assert np.array_equal(views[-1].images, to_uint8(wanted))
