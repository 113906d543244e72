"""The very machine code that an A100 would run: Triton's PTX for sm_80, which the driver of a later card translates,
computes what it should.

An op runs twice: on meta tensors in a process that compiles each of its launches for sm_80, and here, where each launch
is that PTX.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.op_cases import OPS, arguments, result, results_and_gradients, tensors, with_tensors
from uvit_fast.kernels.ops import attention
from uvit_fast.kernels.runtime import device, launch

pytestmark = pytest.mark.gpu
QKV = (2, 258, 3, 4, 72)
NAMES = ["ln_linear_bias", "ln_mlp", "proj_ln_mlp", "skip_linear", "linear_residual", "attention"]
SHAPE = (3, 257, 768)


def case(name: str, where: str) -> tuple:
    """(op, reference, arguments) in bf16."""
    if name == "attention":
        args = [torch.randn(QKV, device=where, dtype=torch.bfloat16).requires_grad_()]
        return attention.attention, attention.reference, args
    return *OPS[name], arguments(name, SHAPE, torch.bfloat16, device=where, grad=True)


def compile_for_sm80(name: str, folder: Path) -> None:
    """The launches of an op's forward and backward, in their order,
    as PTX for sm_80 with what a launch needs to know.
    """
    from uvit_fast.kernels.tools import aot

    launches = []

    def compiled(where, kernel, grid, args, options):
        with aot.target(80):
            made = kernel.warmup(*args, grid=grid, **options)
        kept = [i for i, kind in enumerate(made.src.signature.values()) if kind != "constexpr"][: len(args)]
        kinds = [list(made.src.signature.values())[i] for i in kept]
        about = {"name": made.metadata.name, "shared": made.metadata.shared, "warps": made.metadata.num_warps}
        (folder / f"{len(launches)}.ptx").write_text(made.asm["ptx"])
        launches.append({**about, "kept": kept, "kinds": kinds})

    launch.run, device._INTERPRETING = compiled, True  # meta tensors are taken, and nothing runs
    op, reference, args = case(name, "meta")
    results_and_gradients(op, args, torch.empty_like(result(reference(*args))))
    (folder / "launches.json").write_text(json.dumps(launches))


class Driver:
    """Launches PTX in the place of `launch.run`, one file after the other."""

    def __init__(self, folder: Path):
        from cuda.bindings import driver

        self.driver, self.folder, self.ran = driver, folder, 0
        self.launches, self.modules = json.loads((folder / "launches.json").read_text()), []

    def __call__(self, where, kernel, grid, args, options) -> None:
        import ctypes

        about = self.launches[self.ran]
        assert ".target sm_80" in (ptx := (self.folder / f"{self.ran}.ptx").read_text())
        self.ran += 1
        module = self._do("cuModuleLoadData", ptx.encode() + b"\0")
        self.modules.append(module)
        function = self._do("cuModuleGetFunction", module, about["name"].encode())
        most = self.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._do("cuFuncSetAttribute", function, most, about["shared"])
        kinds = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
        values = [args[i].data_ptr() if k.startswith("*") else args[i] for i, k in zip(about["kept"], about["kinds"])]
        types = [kinds.get(kind, ctypes.c_void_p) for kind in about["kinds"]]
        scratch = [ctypes.c_void_p] * 2  # Triton's own last parameters, unused by these kernels
        stream = torch.cuda.current_stream().cuda_stream
        self._do(
            "cuLaunchKernel", function, *(*grid, 1, 1)[:3], 32 * about["warps"], 1, 1, about["shared"], stream,
            ((*values, 0, 0), (*types, *scratch)), 0,
        )  # fmt: skip

    def _do(self, name: str, *args):
        error, *found = getattr(self.driver, name)(*args)
        assert error == self.driver.CUresult.CUDA_SUCCESS, f"{name}: {error}"
        return found[0] if found else None


@pytest.mark.parametrize("name", NAMES)
def test_an_ops_sm80_code_gives_its_results(name, tmp_path, monkeypatch):
    pytest.importorskip("cuda.bindings")
    command = [sys.executable, "-m", "tests.gpu.test_sm80_code", name, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    op, reference, args = case(name, "cuda")
    dy = torch.randn_like(result(reference(*args)).detach())
    exact = results_and_gradients(reference, with_tensors(lambda t: t.detach().float().requires_grad_(), args), dy)
    eager = results_and_gradients(reference, args, dy)
    monkeypatch.setattr(device, "_FORCED", 80)
    native = results_and_gradients(op, args, dy)
    driver = Driver(tmp_path)
    monkeypatch.setattr(launch, "run", driver)
    ours = results_and_gradients(op, args, dy)
    torch.cuda.synchronize()
    assert driver.ran == len(driver.launches) and len(ours) == 1 + len(tensors(args))
    for i, (out, same, peer, r) in enumerate(zip(ours, native, eager, exact)):
        error, allowed = (out.float() - r).norm(), 2 * (peer.float() - r).norm() + 1e-4 * r.norm()
        assert error <= allowed, (
            f"{name}: result {i} is off by {error / r.norm():.2e}, allowed {allowed / r.norm():.2e}"
        )
        apart = (out.float() - same.float()).norm() / r.norm()
        print(
            f"{name} result {i}: off by {error / r.norm():.2e}; "
            f"from the same kernels compiled for this card {apart:.1e}"
        )


if __name__ == "__main__":
    device._FORCED = 80
    compile_for_sm80(sys.argv[1], Path(sys.argv[2]))
