"""Run every notebook as a test, as `nbdev_test` does, each in a process of its own with a time limit.

    python scripts/run_notebooks_tests.py                        all notebooks
    python scripts/run_notebooks_tests.py nbs/05_partial.ipynb   some of them

`nbdev_test` shares worker processes between notebooks, waits for ever and is content with no notebook at all. Here no
state leaks from one to the next, a hanging cell ends, and the number that ran must be the number that is there.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARK, RESULT = "running the cell ", "notebook result: "


def run_here(path: Path) -> int:
    "Run one notebook with nbdev in this process; a line beginning with RESULT says how many cells ran."
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell
    from nbdev.config import get_config
    from nbdev.test import test_nb

    ran = 0
    cell = CaptureShell.cell

    def counted(self, c, *args, **kwargs):
        nonlocal ran
        ran += c.cell_type == "code" and bool(c.source.strip())
        os.write(2, f"{MARK}{c.source[:200]!r}\n".encode())  # past the shell, which captures sys.stderr
        return cell(self, c, *args, **kwargs)

    CaptureShell.cell = counted
    config = get_config()
    passed, _ = test_nb(path, skip_flags=config.tst_flags.split(), basepath=config.config_path)
    there = sum(c.cell_type == "code" for c in read_nb(path).cells)
    print(f"\n{RESULT}" + json.dumps({"passed": bool(passed), "ran": ran, "there": there}), flush=True)
    return 0


def run(path: Path, timeout: int, threads: int) -> tuple[bool, str]:
    "Run one notebook in a fresh process; whether it passed, and a line about it."
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    env.setdefault("OMP_NUM_THREADS", str(threads))
    command = [sys.executable, __file__, "--here", str(path)]
    start = time.time()
    with subprocess.Popen(command, cwd=ROOT, env=env, text=True, start_new_session=True, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the workers that a cell may have started
            output, _ = process.communicate()
            last = [line for line in output.splitlines() if line.startswith(MARK)][-1:]
            return False, f"FAILED: still running after {timeout} s\n{''.join(last) or 'before the first cell'}"
    said = [line for line in output.splitlines() if line.startswith(RESULT)]
    output = "\n".join(line for line in output.splitlines() if not line.startswith((MARK, RESULT)))
    if not said:
        return False, f"FAILED: ended with {process.returncode} before the last cell\n{output[-5000:]}"
    result = json.loads(said[-1].removeprefix(RESULT))
    counts = f"{result['ran']} of {result['there']} code cells in {time.time() - start:.0f} s"
    if not result["passed"]:
        return False, f"FAILED after {counts}\n{output[-5000:]}"
    if result["ran"] == 0:
        return False, "FAILED: no cell ran (`skip_exec`, or every cell skipped)"
    return True, f"passed, {counts}"


def find(root: Path = ROOT) -> list[Path]:
    "The notebooks that are there, counted without nbdev's help."
    found = [p for p in root.rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(root).parts)]
    return sorted(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of them")
    parser.add_argument("--timeout", type=int, default=300, help="seconds that one notebook may take (default 300)")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="notebooks run at a time")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    paths = [p.resolve() for p in args.notebooks] or find()
    if args.here:
        return run_here(paths[0])
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    passed = ran = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(run, path, args.timeout, threads) for path in paths]
        for path, future in zip(paths, futures):
            good, line = future.result()
            passed, ran = passed + good, ran + 1
            print(f"{os.path.relpath(path, ROOT)}: {line}", flush=True)
    there = len(find())
    if not args.notebooks and (ran != there or not there):
        print(f"{ran} notebooks ran, {there} are there", file=sys.stderr)
        return 1
    print(f"notebooks: {passed} passed, {ran - passed} failed, {ran} of {there} ran")
    return 0 if ran and passed == ran else 1


if __name__ == "__main__":
    sys.exit(main())
