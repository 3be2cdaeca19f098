"""Launch the Triton kernels up to the point where a GPU is needed, and print what the compiler reports as JSON.

    python tests/compile_kernels.py bf16:64:90 fp16:24:80:full:padded

Each argument is dtype:head_dim:compute capability, and then what is special: `full` (not causal), `padded` (with a mask
and late queries), `one` (one token and one head: Triton compiles arguments that are 1 as constants), `ieee` (float32
products without TF32, as `use_tf32=False` asks for). The package's own functions prepare the launches of all three
kernels, with its sizes of blocks for that GPU; a driver that only names the GPU stands in for it, and in place of a
launch the kernel is compiled.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # compile, don't interpret

import torch
import triton
from triton.backends.compiler import GPUTarget

from dilated_attention_nb import triton_backward, triton_forward

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}  # bytes a block may have


class Driver:
    "Names a GPU and can do nothing."

    capability = 90

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Compiled:
    "A kernel that is compiled where it would be launched."

    def __init__(self, kernel, reports: list[dict]) -> None:
        self.kernel, self.reports = kernel, reports

    def __getitem__(self, grid):
        return lambda *args, **options: self.reports.append(report(self.kernel.warmup(*args, grid=grid, **options)))


def resources(cubin: bytes) -> dict[str, int]:
    "Registers a thread and bytes spilled, from the tool that comes with Triton."
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    return {"registers": int(found[1]), "spilled": int(found[2])}


def report(kernel) -> dict:
    ptx = kernel.asm["ptx"]
    return {
        "kernel": kernel.metadata.name,
        "shared": kernel.metadata.shared,
        "atomics": len(re.findall(r"\b(?:atom|red)\.", ptx)),
        "tensor_core": len(re.findall(r"wgmma\.mma_async|mma\.sync", ptx)),
        "async_copies": ptx.count("cp.async"),
    } | resources(kernel.asm["cubin"])


def compile_all(dtype: str, head_dim: int, capability: int, flags: list[str]) -> list[dict]:
    "The reports of the three kernels."
    reports: list[dict] = []
    Driver.capability = capability
    triton_forward._blocks = lambda kernel, q: triton_forward.block_sizes(
        kernel, q.dtype, q.shape[3], SHARED[capability]
    )
    for module, name in ((triton_forward, "forward"), (triton_backward, "queries"), (triton_backward, "keys")):
        kernel = getattr(module, f"{name}_kernel")
        kernel = kernel.kernel if isinstance(kernel, Compiled) else kernel
        setattr(module, f"{name}_kernel", Compiled(kernel, reports))
    padded, causal = "padded" in flags, "full" not in flags
    nq, nk, h, kv = (1, 1, 1, 1) if "one" in flags else (100 if padded else 128, 128, 4, 2)
    q = torch.zeros(1, nq, h, head_dim, dtype=DTYPES[dtype])
    k = torch.zeros(1, nk, kv, head_dim, dtype=DTYPES[dtype])
    mask = torch.zeros(1, nk, dtype=torch.bool) if padded else None
    call, tf32 = ((16, 64), (1, 4), causal, "softmax", "blocked"), "ieee" not in flags
    out, lse = triton_forward.fused_forward(q, k, k, mask, *call, not causal, 0.125, tf32)
    triton_backward.fused_backward(out, q, k, k, out, lse, mask, *call, 0.125, tf32)
    about = {"dtype": dtype, "head_dim": head_dim, "capability": capability, "shared_limit": SHARED[capability]}
    about["tf32"] = tf32
    return [about | found for found in reports]


if __name__ == "__main__":
    triton.runtime.driver.set_active(Driver())
    found = []
    for argument in sys.argv[1:]:
        dtype, head_dim, capability, *flags = argument.split(":")
        found += compile_all(dtype, int(head_dim), int(capability), flags)
    print(json.dumps(found))
