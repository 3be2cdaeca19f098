"""Run all parts of `make test`, whichever of them fail, and say at the end which did.

    python scripts/run_tests.py              what CI runs: imports, export, style, types, notebooks, wheel, tests
    python scripts/run_tests.py --portable   notebooks and tests as on other processors: PyTorch's plain and AVX2
                                             kernels, each with one thread and with three
    python scripts/run_tests.py --slow       the tests that take minutes as well, and what --portable runs

Parts that use one core run beside each other; what each printed is shown when it ends. Notebooks and tests take all
cores, one after the other. The last line counts parts: "parts: 8 passed, 0 failed".
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
TESTS = "-m", "pytest", "-n", "auto", "-m", "not slow"
ALL_CORES = {"notebooks", "tests", "all tests"}
CAPABILITIES, THREADS = ("default", "avx2"), (1, 3)  # of ATEN_CPU_CAPABILITY and OMP_NUM_THREADS


def parts() -> dict[str, list[str]]:
    "The commands of `make test` by the names that are reported."
    return {
        "imports": [sys.executable, "scripts/check_imports.py"],
        "export": [sys.executable, "scripts/check_export.py"],
        "lint": [str(BIN / "ruff"), "check", "."],
        "format": [str(BIN / "ruff"), "format", "--check", "."],
        "types": [str(BIN / "mypy")],
        "notebooks": [sys.executable, "scripts/run_notebooks_tests.py"],
        "wheel": [sys.executable, "scripts/check_wheel.py"],
        "tests": [sys.executable, *TESTS],
    }


def portable() -> dict[str, tuple[list[str], dict[str, str]]]:
    "Commands and what is set for them; threads beyond the cores wait asleep, not in a loop."
    wanted = {}
    for capability, threads in itertools.product(CAPABILITIES, THREADS):
        machine = dict(ATEN_CPU_CAPABILITY=capability, OMP_NUM_THREADS=str(threads), OMP_WAIT_POLICY="passive")
        for name in ("notebooks", "tests"):
            wanted[f"{name}, {capability}, threads: {threads}"] = parts()[name], machine
    return wanted


def slow() -> dict[str, tuple[list[str], dict[str, str]]]:
    "All tests, as this machine computes, and what `portable` runs."
    return {"all tests": ([sys.executable, *TESTS[:-2]], {}), **portable()}


def run_part(name: str, command: list[str], variables: dict[str, str], beside: bool) -> bool:
    "Whether a part passed. What it prints is shown as it comes, or all at once if others run beside it."
    start = time.monotonic()
    pipes: dict = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") if beside else {}
    if not beside:
        print(f"== {name}", flush=True)
    try:
        done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, **pipes)
        status, text = done.returncode, done.stdout or ""
    except OSError as error:  # a program that isn't there
        status, text = 127, f"{error}\n"
    end = f"== {name}: {f'FAILED, status {status}' if status else 'passed'}, {time.monotonic() - start:.0f} s"
    print((f"== {name}\n" if beside else "") + text + end, flush=True)
    return status == 0


def run(commands: dict[str, tuple[list[str], dict[str, str]]]) -> list[str]:
    "Run all of them; the names of those that failed."
    whole = [name for name in commands if name.split(",")[0] in ALL_CORES]
    light = [name for name in commands if name not in whole]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        passed = dict(zip(light, pool.map(lambda name: run_part(name, *commands[name], beside=True), light)))
    passed |= {name: run_part(name, *commands[name], beside=False) for name in whole}
    return [name for name in commands if not passed[name]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--portable", action="store_true", help="notebooks and tests as on other processors")
    choice.add_argument("--slow", action="store_true", help="all tests, then what --portable runs")
    args = parser.parse_args()
    usual = {name: (command, {}) for name, command in parts().items()}
    commands = portable() if args.portable else slow() if args.slow else usual
    failed = run(commands)
    if failed:
        print("failed: " + "; ".join(failed))
    print(f"parts: {len(commands) - len(failed)} passed, {len(failed)} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
