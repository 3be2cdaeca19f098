"""Compile the Triton kernels for NVIDIA GPUs, without one, and print what the compiler reports as JSON.

    python tests/compile_kernels.py forward:bf16:64:90 keys:fp32:128:80

Each argument is kernel:dtype:head_dim:compute capability. Sizes of blocks are those that the package would choose.
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
from triton.compiler import ASTSource

from dilated_attention_nb import triton_backward, triton_forward

KERNELS = {
    "forward": triton_forward.forward_kernel,
    "queries": triton_backward.queries_kernel,
    "keys": triton_backward.keys_kernel,
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}  # bytes a block may have
HALVES = ("q", "k", "v", "out", "g", "dq", "dk", "dv")


def source(kernel, dtype: str, constants: dict, padded: bool) -> ASTSource:
    "Signature as a launch would make it: head_dim contiguous, other strides and pointers multiples of 16."
    signature, values, hints = {}, {}, {}
    multiple = [["tt.divisibility", 16]]
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(i,)] = "constexpr", constants[name]
        elif name in HALVES or name in ("lse", "logs", "logs_out", "deltas", "classes", "branches"):
            kind = dtype if name in HALVES else "i32" if name in ("classes", "branches") else "fp32"
            signature[name], hints[(i,)] = f"*{kind}", multiple
        elif name in ("pad", "sp") and not padded:
            signature[name], values[(i,)] = "constexpr", None
        elif name == "pad":
            signature[name] = "*u8"
        elif name in ("sp", "sl"):
            ones = 1 if name == "sp" else 2
            signature[name], values[(i, ones)] = ("i32",) * ones + ("constexpr",), 1
        elif name in ("scale", "scale2", "share"):
            signature[name] = "fp32"
        elif name.startswith("s"):
            signature[name], values[(i, 3)] = ("i32", "i32", "i32", "constexpr"), 1
            hints |= {(i, j): multiple for j in range(3)}
        else:
            signature[name] = "i32"
    return ASTSource(kernel, signature, values, hints)


def resources(cubin: bytes) -> dict[str, int]:
    "Registers a thread and bytes spilled, from the tool that comes with Triton."
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    return {"registers": int(found[1]), "spilled": int(found[2])} if found else {}


def report(name: str, dtype: str, head_dim: int, capability: int, causal: bool = True, padded: bool = False) -> dict:
    sizes = triton_forward.block_sizes(name, DTYPES[dtype], head_dim, SHARED[capability])
    constants = dict(
        CLASSES=8, ENTRIES=5, CAUSAL=causal, ZEROS=not causal, PADDED=padded, D=head_dim, PRECISION="tf32", WIDE=False,
        WIDTH=max(16, triton.next_power_of_2(head_dim)), OWN=sizes.own, STEP=sizes.step,
    )  # fmt: skip
    constants = {key: value for key, value in constants.items() if key in KERNELS[name].arg_names}
    compiled = triton.compile(
        source(KERNELS[name], dtype, constants, padded),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": sizes.warps, "num_stages": sizes.stages},
    )
    ptx = compiled.asm["ptx"]
    return {
        "kernel": name, "dtype": dtype, "head_dim": head_dim, "capability": capability,
        "shared": compiled.metadata.shared, "shared_limit": SHARED[capability],
        "atomics": len(re.findall(r"\b(?:atom|red)\.", ptx)),
        "tensor_core": len(re.findall(r"wgmma\.mma_async|mma\.sync", ptx)),
        "async_copies": ptx.count("cp.async"), **resources(compiled.asm["cubin"]),
    }  # fmt: skip


if __name__ == "__main__":
    found = []
    for argument in sys.argv[1:]:
        name, dtype, head_dim, capability, *flags = argument.split(":")
        found.append(report(name, dtype, int(head_dim), int(capability), "full" not in flags, "padded" in flags))
    print(json.dumps(found))
