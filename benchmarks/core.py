"""Measure the core layers and store the figures in benchmarks/core.json.

    python benchmarks/core.py                   all sections (about half an hour on two cores)
    python benchmarks/core.py floor memory      some of them

Every figure is a ratio of medians of runs that alternate within one process, so that a busy machine slows both sides.
Each section keeps its own device, threads, versions and date: sections measured at different times stand side by side.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).with_name("core.json")


def environment() -> dict[str, Any]:
    "Where a section was measured."
    names = [x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    features = [x for x in ("avx512_bf16", "amx_bf16") if x in Path("/proc/cpuinfo").read_text()]
    return {
        "device": "cpu",
        "processor": " ".join([names[0] if names else platform.machine(), *features]),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def alternate(runs: dict[str, Callable[[], Any]], repeats: int = 7) -> dict[str, float]:
    "Median seconds of each run, taken in turn; one round of warm-up."
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(repeats + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if round_:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def causal_mask() -> dict[str, Any]:
    "A loop over pairs against one comparison."
    from dilated_attention_nb.masking import causal_mask as vectorised

    def looped(n: int) -> torch.Tensor:
        mask = torch.zeros(n, n, dtype=torch.bool)
        for i in range(n):
            for j in range(n):
                if j <= i:
                    mask[i, j] = True
        return mask

    rows = []
    for n in (128, 256, 512, 1024):
        assert torch.equal(looped(n), vectorised(n, n))
        t = alternate({"loop": lambda n=n: looped(n), "vectorised": lambda n=n: vectorised(n, n)}, 3)  # type: ignore[misc]
        rows.append({"n": n, "loop_ms": t["loop"] * 1e3, "vectorised_ms": t["vectorised"] * 1e3})
    return {"rows": rows}


SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {"causal_mask": causal_mask}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS) + "; none: all")
    chosen = parser.parse_args().sections or list(SECTIONS)
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(f"unknown section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    for name in chosen:
        print(f"{name} ...", flush=True)
        result = environment() | SECTIONS[name]()
        stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps(stored | {name: result}, indent=1) + "\n")
        print(json.dumps(result, indent=1), flush=True)


if __name__ == "__main__":
    main()
