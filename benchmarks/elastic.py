"""Kill a worker of a real run, watch it go on, and store what happened when in benchmarks/elastic.json.

    python benchmarks/elastic.py        under a minute on two cores

`torchrun` starts two processes that share each sequence. One of them is killed with SIGKILL in mid-training. Everything
is seen from outside: lines of losses.jsonl are steps, folders are checkpoints, the log says when processes are there.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dilated_attention_nb.benchmarks import environment, run_sections

RESULTS = Path(__file__).with_name("elastic.json")
STEPS, EVERY, KILL_AFTER = 60, 15, 38
MODEL = "--context 2048 --rows 2 --width 64 --layers 2"
LAUNCHER = "--nproc-per-node 2 --max-restarts 1 -m dilated_attention_nb.elastic --sequence-parallel 2"
COMMAND = f"{LAUNCHER} --steps {STEPS} --checkpoint-every {EVERY} {MODEL}"


def watched(folder: Path) -> list[list[Any]]:
    "`[seconds, what, number]`: what happens in a run whose rank 1 is killed after a step."
    log, rows, events = folder / "log", folder / "losses.jsonl", []
    seen: dict[str, set[str]] = {"part": set(), "whole": set()}
    starts = steps = 0
    killed = False
    command = [sys.executable, "-m", "torch.distributed.run", *COMMAND.split(), "--folder", str(folder)]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log, "w") as out:
        begin = time.monotonic()
        run = subprocess.Popen(command, stdout=out, stderr=out, env=environ)
        try:
            while (status := run.poll()) is None:
                now = round(time.monotonic() - begin, 3)
                found = re.findall(r"rank 1 is process (\d+)", log.read_text())
                for _ in found[starts:]:
                    events.append([now, "joined", starts])
                    starts += 1
                lines = rows.read_text().splitlines() if rows.exists() else []
                for line in lines[steps:]:
                    events.append([now, "step", json.loads(line)["step"]])
                    steps += 1
                for path in folder.glob("step-*"):
                    kind, name = ("part", path.stem) if path.suffix == ".part" else ("whole", path.name)
                    if name not in seen[kind]:
                        seen[kind].add(name)
                        events.append([now, kind, int(name[-8:])])
                if not killed and steps >= KILL_AFTER:
                    os.kill(int(found[-1]), signal.SIGKILL)
                    events.append([round(time.monotonic() - begin, 3), "killed", 1])
                    killed = True
                time.sleep(0.002)
        finally:
            if run.poll() is None:
                run.terminate()
                run.wait(30)
    if status or not killed:
        raise RuntimeError(f"status {status}, killed: {killed}; the log ends with {log.read_text()[-2000:]}")
    return events


def restart() -> dict[str, Any]:
    "A worker that is killed, and what the run makes of it."
    with TemporaryDirectory() as folder:
        events = watched(Path(folder))
        size = sum(path.stat().st_size for path in Path(folder, f"step-{STEPS:08}").iterdir())
    line = "seconds since torchrun began, what, number (of the attempt, step or checkpoint; killed: the rank)"
    times = {(what, number): at for at, what, number in events}
    print({key: times[key] for key in times if key[0] != "step"})
    about = {"dtype": "float32", "command": f"torchrun {COMMAND}", "line": line}
    return about | {"checkpoint_bytes": size, "events": events}


SECTIONS = {"restart": restart}


if __name__ == "__main__":
    sys.exit(run_sections(__doc__, RESULTS, SECTIONS, origin=lambda: environment() | {"threads": 1}))
