"""The tests of one op: in Triton's interpreter, its kernels' contracts, and on a GPU where there is one.

`python -m tests.kernels ln_mlp` is `make test-kernel OP=ln_mlp`; more arguments are pytest's.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
OPS = sorted(file.stem for file in (ROOT / "kernels" / "ops").glob("[a-z]*.py"))
# Where an op is tested beside test_<op>.py, and what of those files is its own beside what bears its name.
_LINEAR = (
    (
        "tests/kernels/test_ops.py",
        "tests/kernels/test_ln_linear.py",
        "tests/kernels/test_contracts.py",
        "tests/gpu/test_ops.py",
    ),
    "contract",
)
_OTHERS = {
    "adamw": (("tests/kernels/test_contracts.py", "tests/gpu/test_optimizer.py"), "contract or test_optimizer"),
    "attention": (("tests/gpu/test_attention.py",), "test_attention"),
    "timestep_embedding": (("tests/gpu/test_ops.py",), "times_embedding"),
    "unpatchify": (("tests/gpu/test_ops.py",), "final_image"),
    "solver_step": (("tests/gpu/test_captured_loop.py",), "fused_update"),
}


def selected(op: str) -> list[str]:
    """Return pytest's arguments that choose the tests of an op."""
    files, words = _OTHERS.get(op, _LINEAR)
    own = f"tests/kernels/test_{op}.py"
    if (ROOT / own).exists() and own not in files:
        files = (own, *files)
    return [*files, "-k", f"{op} or {words}"]


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in OPS:
        got = f"got {arguments[0]!r}" if arguments else "got none"
        print(f"expected an op, as in `make test-kernel OP=ln_mlp`, of {', '.join(OPS)}; {got}", file=sys.stderr)
        return 2
    import torch  # which takes seconds: after the arguments are known to make sense

    op, *more = arguments
    command = [sys.executable, "-m", "pytest", "-q", *selected(op), *more]
    # Two processes: to compile without a GPU, the contracts put a stand-in for Triton's driver in place.
    failed = subprocess.run([*command, "-m", "not gpu"], cwd=ROOT).returncode
    if not torch.cuda.is_available():
        print(f"No GPU here: what tests {op} on one did not run.")
        return failed
    return subprocess.run([*command, "-m", "gpu"], cwd=ROOT).returncode or failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
