"""Measure what importing the package adds to `import torch` and store the figures in benchmarks/package.json.

    python benchmarks/package.py                       the one section, in about a minute and a half
    python benchmarks/package.py --check importing     store nothing; say what is worse than what is stored

Every import is timed in a fresh process, after `import torch` in the same process: `added_s` is what it takes longer
than PyTorch alone, `ratio` that relative to PyTorch's own time. Medians over processes that take turns.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from dilated_attention_nb.benchmarks import run_sections, show_rows

RESULTS = Path(__file__).with_name("package.json")
LINES = {
    "the package": "import dilated_attention_nb",
    "one function": "from dilated_attention_nb import dilated_attention",
    "a model": "from dilated_attention_nb import LongNet",
    "everything": "import dilated_attention_nb as d; [getattr(d, name) for name in d.__all__]",
}
PROCESSES = 9
PROBE = """
import time
begin = time.perf_counter()
import torch
middle = time.perf_counter()
{line}
print(middle - begin, time.perf_counter() - middle)
"""


def seconds(line: str) -> tuple[float, float]:
    "PyTorch's import and then this line, in a process of their own."
    code = [sys.executable, "-c", PROBE.format(line=line)]
    torch_s, added_s = subprocess.run(code, capture_output=True, text=True, check=True).stdout.split()
    return float(torch_s), float(added_s)


def importing() -> dict[str, Any]:
    "Several imports; a first round, which finds files that are not in the system's cache yet, is left out."
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in LINES}
    for _ in range(PROCESSES + 1):
        for name, line in LINES.items():
            found[name].append(seconds(line))
    rows = []
    for name, pairs in found.items():
        torch_s, added_s = (statistics.median(times) for times in zip(*pairs[1:]))
        ratio = statistics.median(added / alone for alone, added in pairs[1:])
        rows.append({"what": name, "added_s": added_s, "torch_s": torch_s, "ratio": ratio})
    return {"processes": PROCESSES, "rows": show_rows(rows)}


SECTIONS = {"importing": importing}

if __name__ == "__main__":
    sys.exit(run_sections(__doc__, RESULTS, SECTIONS))
