"""Checks on a long run that memory, open files, disk and the time per update do not grow.

    python tests/soak.py            1000 updates of the toy, 2 processes, a checkpoint every 50

Prints the slope of each over the second half of the run, with its standard error. Exits with 1 if
something grows by more than 1 % per thousand updates. This is no pytest test: it takes minutes.

A leak shows in the bytes that malloc has handed out, which each process logs every 50 updates.
Resident memory is only printed: it varies by about 10 MB with fragmentation of the heap. Needs
Linux with glibc 2.33 or later.
"""

import argparse
import ctypes
import gc
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PAGE, EVERY = os.sysconf("SC_PAGE_SIZE"), 50


class Heap(ctypes.Structure):
    """What mallinfo2 returns: sizes in bytes."""
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def work(flags: list[str]) -> int:
    """Runs latro.py. Every 50 updates, adds a line to {out}/heap-RANK: update, bytes in use."""
    sys.path.insert(0, str(ROOT))
    import latro
    mallinfo2, draw_batch = ctypes.CDLL(None).mallinfo2, latro.draw_batch
    mallinfo2.restype = Heap

    def draw_batch_and_log_heap(examples, step, args):
        if step % EVERY == 0:
            gc.collect()
            heap = mallinfo2()
            with Path(args.out, f"heap-{os.environ.get('RANK', 0)}").open("a") as f:
                f.write(f"{step} {heap.uordblks + heap.hblkhd}\n")
        return draw_batch(examples, step, args)
    latro.draw_batch = draw_batch_and_log_heap
    return latro.main(flags)


def workers(parent: int) -> list[int]:
    """Process ids of torchrun's workers."""
    path = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def measure(pids: list[int], out: Path) -> dict[str, float]:
    """The workers' resident MB and open files, MB of the run's states, workers alive, and updates
    so far."""
    pages = [int(Path(f"/proc/{p}/statm").read_text().split()[1]) for p in pids]
    states = [f.stat().st_size for f in (out / "state").rglob("*") if f.is_file()]
    metrics = out / "metrics.jsonl"
    return dict(resident_mb=sum(pages) * PAGE / 1e6, disk_mb=sum(states) / 1e6,
                workers=sum(map(bool, pages)),
                files=sum(len(os.listdir(f"/proc/{p}/fd")) for p in pids),
                updates=metrics.read_bytes().count(b"\n") if metrics.exists() else 0)


def slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """The slope of the least-squares line, and its standard error."""
    (a, _), residual, *_ = np.linalg.lstsq(np.stack([x, np.ones_like(x)], 1), y, rcond=None)
    spread = float(residual[0]) if len(residual) else 0.0
    return float(a), (spread / max(1, len(x) - 2) / ((x - x.mean()) ** 2).sum()) ** 0.5


def watch(out: Path, steps: int, processes: int) -> list[dict[str, float]]:
    """Trains the toy in other processes. Returns measurements, two per second at most."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes,
               __file__, "work", "--questions", 2, "--K", 4, "--steps", steps, "--save-every",
               EVERY, "--eval-every", EVERY, "--eval-questions", 10, "--out", out]
    job = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    measured = []
    while job.poll() is None:
        try:
            now = measure(workers(job.pid), out)
        except FileNotFoundError:  # a process ended or a state was removed meanwhile
            continue
        if now["updates"] and now["workers"] == processes:
            measured.append(now | dict(seconds=time.monotonic()))
        time.sleep(0.5)
    if job.returncode:
        sys.exit(f"the run ended with exit code {job.returncode}")
    return measured


def report(name: str, x: np.ndarray, y: np.ndarray) -> list[str]:
    """Prints how y changed over updates x. Returns [name] if it grew by more than 3 standard errors
    and 1 % per thousand updates, else []."""
    rise, error = slope(x, y)
    print(f"{name}: {y[0]:.2f} at update {x[0]:.0f}, {y[-1]:.2f} at {x[-1]:.0f}, maximum"
          f" {y.max():.2f}, {1000 * rise:+.2f} +- {1000 * error:.2f} per thousand updates")
    return [name] if rise > 3 * error and 1000 * rise > 0.01 * y.mean() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = watch(Path(folder, "out"), args.steps, args.processes)
        heaps = [np.loadtxt(f) for f in sorted(Path(folder, "out").glob("heap-*"))]
    series = {name: np.array([row[name] for row in measured], float) for name in measured[0]}
    late = series["updates"] > args.steps / 2
    x, resident = series["updates"][late], series["resident_mb"][late]
    print(f"resident_mb: from {resident.min():.0f} to {resident.max():.0f}")
    grown = report("files", x, series["files"][late])
    grown += report("disk_mb", x, series["disk_mb"][late])
    update, heap_mb = heaps[0][:, 0], sum(heap[:, 1] for heap in heaps) / 1e6
    grown += report("heap_mb", update[update > args.steps / 2], heap_mb[update > args.steps / 2])
    halves = [(series["updates"][half], series["seconds"][half]) for half in (~late, late)]
    first, second = (slope(*half)[0] for half in halves)
    print(f"seconds per update: {first:.3f} in the first half, {second:.3f} in the second")
    grown += ["seconds"] if second > 1.1 * first else []
    sys.exit(f"grows: {', '.join(grown)}" if grown else 0)


if __name__ == "__main__":
    sys.exit(work(sys.argv[2:]) if sys.argv[1:2] == ["work"] else main())
