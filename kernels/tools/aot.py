"""Compile kernels ahead of time, without a GPU, and read their resources: a throughput guard that needs no device.

`target(90)` installs a driver that knows the architecture and nothing else; `kernel.warmup(...)` then compiles for it.
`resources` reads registers, spills, shared memory and the relevant instructions from the result, with the `ptxas` and
`cuobjdump` that ship inside triton. Never use it in a process that also launches kernels on a GPU.
"""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # shared memory per block in bytes, by architecture
_INSTRUCTIONS = {  # field of the report -> pattern of its instructions in the disassembly
    "wgmma": r"\b[HQ]GMMA\b",
    "wgmma_waits": r"WARPGROUP\.DEPBAR",
    "mma": r"\bHMMA\b",
    "tma_loads": r"UTMALDG",
    "tma_stores": r"UTMASTG",
    "cp_async": r"LDGSTS",
    "local_accesses": r"\b(?:LDL|STL)\b",
}
_READER = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]  # another version's readings do not count


def _driver(arch: int) -> SimpleNamespace:
    """Return the part of a driver that triton's compiler needs, without anything that needs a device."""
    return SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_current_device=lambda: arch,  # a jit function caches by device: each architecture is one
        get_current_stream=lambda device: 0,
    )


@contextlib.contextmanager
def target(arch: int) -> Iterator[None]:
    """Compile for compute capability `arch` (80 or 90) inside the context, whatever this machine has."""
    config = triton.runtime.driver
    before = config._active
    config.set_active(_driver(arch))
    try:
        yield
    finally:
        config._active = before


def compile(kernel: Any, *args: Any, arch: int, **options: Any) -> dict[str, int]:
    """Compile one kernel for `arch` and return its resources (see `resources`).

    Args:
        kernel: a `triton.jit` or `gluon.jit` function.
        args: its arguments; meta tensors suffice, since only dtype and alignment count.
        options: keyword arguments of the kernel and of its launch (`num_warps`, ...).
    """
    with target(arch):
        return resources(kernel.warmup(*args, grid=(1,), **options), arch)


def resources(compiled: Any, arch: int) -> dict[str, int]:
    """Return the resources of a compiled kernel; read once, and then kept beside the kernel in Triton's cache.

    Returns:
        Registers per thread; spilled bytes (stores + loads); shared memory in bytes; the count of each instruction of
        `_INSTRUCTIONS` in the code; `serialized_wgmma`: 1 if ptxas reports that it had to serialise them.
    """
    kept, name = get_cache_manager(compiled.hash), f"resources.{_READER}.json"
    known = kept.get_file(name)
    if known is None:
        known = kept.put(json.dumps(_read(compiled, arch)), name, binary=False)
    return json.loads(Path(known).read_text())


def _read(compiled: Any, arch: int) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = os.path.join(folder, "kernel.ptx"), os.path.join(folder, "kernel.cubin")
        with open(ptx, "w") as file:
            file.write(compiled.asm["ptx"])
        with open(cubin, "wb") as file:
            file.write(compiled.asm["cubin"])
        suffix = "a" if arch >= 90 else ""
        report = _tool("ptxas", "-v", f"-arch=sm_{arch}{suffix}", ptx, "-o", os.path.join(folder, "again.cubin"))
        code = _tool("cuobjdump", "-sass", cubin)
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", report)]
    found = {
        "registers": max(int(n) for n in re.findall(r"Used (\d+) registers", report)),
        "spilled": sum(spills),
        "shared": compiled.metadata.shared,
        "serialized_wgmma": int("C7510" in report or "C7514" in report or "serialized" in report),
    }
    return found | {name: len(re.findall(pattern, code)) for name, pattern in _INSTRUCTIONS.items()}


def _tool(name: str, *args: str) -> str:
    path = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)
    done = subprocess.run([path, *args], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr[-2000:]}")
    return done.stdout + done.stderr
