"""Run every notebook as a test, as `nbdev_test` does, each in a process of its own with a time limit, and compare what
its cells show with what they store (`outputs.py`).

    python scripts/run_notebooks_tests.py                        all notebooks
    python scripts/run_notebooks_tests.py nbs/04_partial.ipynb   some of them

`nbdev_test` shares worker processes between notebooks, waits for ever and is content with no notebook at all. Here no
state leaks from one to the next, a hanging cell ends, and the number that ran must be the number that is there. Cells
that are skipped (`#| notest`, `#| eval: false`) are compared by `notebooks.py --check` alone, or not at all.
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

from outputs import differences, environment, misused

ROOT = Path(__file__).resolve().parent.parent
MARK, RESULT = "running the cell ", "notebook result: "


def run_here(path: Path) -> int:
    "Run one notebook with nbdev in this process; a line beginning with RESULT says how many cells ran."
    import execnb.shell
    import nbdev.test
    from fastcore.basics import AttrDict
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output
    from nbdev.config import get_config

    stored = {c["id"]: (i, c) for i, c in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"], 1)}
    code = {key: (i, c) for key, (i, c) in stored.items() if c["cell_type"] == "code"}
    ran, wrong = 0, [f"cell {i} ({key}): {why}" for key, (i, c) in code.items() if (why := misused(c))]

    # as in Jupyter, MPLBACKEND names the backend, which is loaded with the first figure and then looks for the shell
    execnb.shell.set_matplotlib_formats = None
    sys.modules.pop("matplotlib_inline.backend_inline", None)

    class Shell(execnb.shell.CaptureShell):
        "nbdev's shell, showing what Jupyter shows: what is printed in a cell that ends with `;`, too."

        def __init__(self, path):
            super().__init__(path)
            self.displayhook.compute_format_data = lambda result: ({}, {})  # done once, for the output that is kept

        def _run(self, raw_cell, store_history=False, silent=False, shell_futures=True, cell_id=None, **_):
            quiet = raw_cell.rstrip().endswith(";")
            self.displayhook.quiet = lambda: quiet
            with capture_output() as c:
                result = InteractiveShell.run_cell(
                    self, raw_cell, store_history, silent, shell_futures=shell_futures, cell_id=cell_id
                )
            return AttrDict(result=result, stdout=c.stdout, stderr=c.stderr, display_objects=c.outputs,
                            exception=result.error_in_exec or result.error_before_exec, quiet=quiet)  # fmt: skip

        def cell(self, c, *args, **kwargs):
            nonlocal ran
            os.write(2, f"{MARK}{c.source[:200]!r}\n".encode())  # past the shell, which captures sys.stderr
            c.outputs = []
            super().cell(c, *args, **kwargs)
            if c.cell_type == "code" and c.source.strip():
                ran += 1
                i, before = code[c.id]
                if not self.exc and not misused(before):
                    wrong.extend(f"cell {i} ({c.id}): {why}" for why in differences(before, c.outputs))

    nbdev.test.CaptureShell = Shell
    config = get_config()
    passed, _ = nbdev.test.test_nb(path, skip_flags=config.tst_flags.split(), basepath=config.config_path)
    result = {"passed": bool(passed), "ran": ran, "there": len(code), "differences": wrong}
    print(f"\n{RESULT}" + json.dumps(result), flush=True)
    return 0


def run(path: Path, timeout: int) -> tuple[bool, str]:
    "Run one notebook in a fresh process; whether it passed, and a line about it."
    command = [sys.executable, __file__, "--here", str(path)]
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    start = time.time()
    with subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, start_new_session=True, **pipes) as process:
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
    if result["differences"]:
        return False, "\n  ".join([f"FAILED: {counts}, not all of which show what is stored", *result["differences"]])
    return True, f"passed, {counts}"


def find(root: Path = ROOT) -> list[Path]:
    "The notebooks that are there, counted without nbdev's help."
    found = [p for p in root.rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(root).parts)]
    return sorted(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of them")
    parser.add_argument("--timeout", type=int, default=1500, help="seconds that one notebook may take (default 1500)")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="notebooks run at a time")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    paths = [p.resolve() for p in args.notebooks] or find()
    if args.here:
        return run_here(paths[0])
    passed = ran = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(run, path, args.timeout) for path in paths]
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
