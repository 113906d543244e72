"""A calibrated plan reuses what was measured to change least, as much as was asked for."""

import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from uvit_fast import build_model, build_sampler, cli, load_config
from uvit_fast.config.plans import read_plan
from uvit_fast.diffusion.samplers import DPMSolverPPMultistep, DPMSolverSinglestep
from uvit_fast.diffusion.schedules import SDSchedule, VPSchedule
from uvit_fast.model.cached import sublayers
from uvit_fast.runtime.errors import UserError
from uvit_fast.sampling.calibration import Errors, find, measure, stage_weights
from uvit_fast.sampling.loop import sample

NAMES = sublayers(2)
SMALL = ["model.embed_dim=32", "model.depth=2", "sample.steps=7"]


def test_inner_evaluations_count_as_the_dearest_of_their_interval():
    """Short steps of order 3 have 1/4, 0, 3/4, the last one of order 2 has 0, 1. By 2M all count alike."""
    weights = stage_weights(DPMSolverSinglestep(VPSchedule(), 500).stages)
    for start, middle, end in zip(weights[:498:3], weights[1:498:3], weights[2:498:3]):
        assert start == pytest.approx(0.75, rel=0.1) and middle == end == pytest.approx(2.25, rel=0.1)
    assert weights[-2:] == [0.25, pytest.approx(2, rel=1e-6)]
    assert stage_weights(DPMSolverPPMultistep(SDSchedule(), 9).stages) == [1.0] * 9


def test_errors_are_those_of_outputs_one_to_three_evaluations_old():
    cfg = load_config("configs/digits_eps.yaml", [*SMALL, "sample.guidance_interval=[0.2,0.9]"])
    net, outputs = build_model(cfg).eval().requires_grad_(False), []
    errors = measure(net, cfg, 2, NAMES, labels=torch.arange(2))
    assert errors.values.shape == (7, 3, len(NAMES)) and set(errors.rows) == {2, 4}
    hook = net.mid_block.mlp.register_forward_hook(lambda module, args, out: outputs.append(out.clone()))
    next(sample(net, cfg, 2, labels=torch.arange(2)))
    hook.remove()
    k = NAMES.index("mid_block.mlp")
    for i in range(7):
        for gap in (1, 2, 3):
            new, got = outputs[i], errors.values[i, gap - 1, k]
            if i < gap or len(outputs[i - gap]) < len(new):
                assert got == np.inf
            else:
                old = outputs[i - gap][: len(new)]
                assert got == pytest.approx(float((old - new).abs().sum() / new.abs().sum()), rel=1e-3)


def test_the_smallest_bound_that_is_fast_enough_is_found():
    """One sublayer changes little, one much, the others too much; each is a tenth of the network."""
    values = np.full((10, 3, len(NAMES)), 9.0)
    values[:, :, 0], values[:, :, 1] = 0.1, 0.5
    costs, errors = [1.0] * len(NAMES), Errors(values, [2] * 10)
    little = one, two, three = find(errors, [1.0] * 10, NAMES, costs, 10.0, 1.04)
    assert all(each.bound == 0.1 and {name for plan in each.plan for name in plan} == {NAMES[0]} for each in little)
    assert [bool(each) for each in one.plan] == [False, True, False, True, False, True, False, True, False, False]
    assert [bool(each) for each in two.plan] == [False, True, True, False, True, True, False, True, True, False]
    assert [bool(each) for each in three.plan] == [False, True, True, True, False, True, True, True, False, False]
    assert one.speedup == pytest.approx(100 / 96) and three.speedup == pytest.approx(100 / 94)
    assert [each.bound for each in find(errors, [1.0] * 10, NAMES, costs, 10.0, 1.1)] == [9.0, 0.5, 0.5]
    assert len(find(errors, [1.0] * 10, NAMES, costs, 10.0, 1.5)) == 2  # which one in a row does not reach
    dear = find(errors, [1.0, 1.0, 7.0] + [1.0] * 7, NAMES, costs, 10.0, 1.05)
    assert all(not each.plan[2] and each.speedup >= 1.05 for each in dear)
    with pytest.raises(UserError, match=r"--speedup 3: .* at most 1.56"):
        find(errors, [1.0] * 10, NAMES, costs, 10.0, 3)


def test_the_command_writes_a_plan_that_sampling_takes(tmp_path, capsys):
    cfg = load_config("configs/digits_eps.yaml", SMALL)
    save_file(build_model(cfg).state_dict(), tmp_path / "ema.safetensors")
    plan, sets = tmp_path / "plan.json", [part for text in SMALL for part in ("--set", text)]
    command = ["--config", "configs/digits_eps.yaml", *sets, "--checkpoint", str(tmp_path / "ema.safetensors")]
    command = ["calibrate", *command, "--num", "4", "--out", str(plan)]
    assert cli.main([*command, "--speedup", "1.3"]) == 0
    assert "1 uncached" not in (said := capsys.readouterr().out) and "5 uncached evaluations" in said
    assert read_plan(plan).steps == 7 and "fewer multiply-adds" in read_plan(plan).about
    assert any(
        stage.layers
        for stage in build_sampler(load_config("configs/digits_eps.yaml", [*SMALL, f"sample.cache={plan}"])).stages
    )
    for more, message in (
        (["--speedup", "1.3"], "expected a new file"),
        (["--speedup", "0.9", "--out", "x.yaml"], "--speedup: expected a number above 1, got 0.9"),
        (["--speedup", "9", "--out", str(tmp_path / "x.yaml")], "--speedup 9: .* expected at most"),
        (["--speedup", "2", "--out", "x.yaml", "--set", "sample.cache=outer:2"], "sample.cache none"),
    ):
        assert cli.main([*command, *more]) == 2
        assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "x.yaml").exists()
