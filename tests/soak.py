"""A long run watched from outside: do memory, open files, disk or the time of an update grow?

    python tests/soak.py            1000 updates of the toy, 2 processes, a checkpoint every 50

Prints, for the second half of the run, the slope of each with its standard error, and exits with 1
where memory or time grow by more than noise explains. Not a test: it takes minutes.

All threads share one heap here. glibc would give each its own, and those fill up for some 1500
updates, which a leak could hide behind; MALLOC_ARENA_MAX=8 shows it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PAGE = os.sysconf("SC_PAGE_SIZE")


def workers(parent: int) -> list[int]:
    """The processes that torchrun has started."""
    path = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def look(pids: list[int], out: Path) -> dict[str, float]:
    """How many workers are alive, their resident MB and open files, MB of the run's states, updates
    so far."""
    pages = [int(Path(f"/proc/{p}/statm").read_text().split()[1]) for p in pids]
    states = [f.stat().st_size for f in (out / "state").rglob("*") if f.is_file()]
    metrics = out / "metrics.jsonl"
    return dict(resident_mb=sum(pages) * PAGE / 1e6, disk_mb=sum(states) / 1e6,
                workers=sum(map(bool, pages)),
                files=sum(len(os.listdir(f"/proc/{p}/fd")) for p in pids),
                updates=metrics.read_bytes().count(b"\n") if metrics.exists() else 0)


def slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Of a line of least squares, and its standard error."""
    (a, _), residual, *_ = np.linalg.lstsq(np.stack([x, np.ones_like(x)], 1), y, rcond=None)
    spread = float(residual[0]) if len(residual) else 0.0
    return float(a), (spread / max(1, len(x) - 2) / ((x - x.mean()) ** 2).sum()) ** 0.5


def watch(out: Path, steps: int, processes: int) -> list[dict[str, float]]:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes,
               ROOT / "latro.py", "--questions", 2, "--K", 4, "--steps", steps, "--save-every", 50,
               "--eval-every", 50, "--eval-questions", 10, "--out", out]
    job = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL, env={"MALLOC_ARENA_MAX": "1"} | os.environ |
                           {"OMP_NUM_THREADS": "1"})
    seen = []
    while job.poll() is None:
        try:
            now = look(workers(job.pid), out)
        except FileNotFoundError:  # a process or a state ended under our eyes
            continue
        if now["updates"] and now["workers"] == processes:
            seen.append(now | dict(seconds=time.monotonic()))
        time.sleep(0.5)
    if job.returncode:
        sys.exit(f"the run ended with exit code {job.returncode}")
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seen = watch(Path(folder, "out"), args.steps, args.processes)
    columns = {name: np.array([row[name] for row in seen], float) for name in seen[0]}
    late = columns["updates"] > args.steps / 2
    x, grown = columns["updates"][late], []
    for name in ("resident_mb", "files", "disk_mb"):
        y = columns[name][late]
        rise, error = slope(x, y)
        print(f"{name}: {y[0]:.1f} at update {x[0]:.0f}, {y[-1]:.1f} at {x[-1]:.0f}, most"
              f" {y.max():.1f}; {1000 * rise:+.2f} +- {1000 * error:.2f} a thousand updates")
        if rise > 3 * error and 1000 * rise > 0.01 * y.mean():
            grown.append(name)
    pace = [np.polyfit(columns["updates"][part], columns["seconds"][part], 1)[0]
            for part in (~late, late)]
    print(f"seconds an update: {pace[0]:.3f} in the first half, {pace[1]:.3f} in the second")
    if pace[1] > 1.1 * pace[0]:
        grown.append("seconds")
    sys.exit(f"grows: {', '.join(grown)}" if grown else 0)


if __name__ == "__main__":
    main()
