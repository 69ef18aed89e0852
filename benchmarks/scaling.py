"""How the cost of an update grows: seconds and memory over K, L, prompt, vocabulary, processes.

Every point is measured in a process of its own, on random weights at the toy's size. `padded` is
what one would write first: `generate`, then K rows of prompt, rationale and answer in one padded
pass.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness import distributed
from latro import Rationale

from .rivals import Generate, Trl
from .timing import OURS, device
from .work import PHASES, Loop, Ours, Workload

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS, BASE = 8, dict(K=16, L=48, prompt=40, V=512)
AXES = dict(K=(4, 8, 16, 32, 64), L=(24, 48, 100, 200, 400), prompt=(20, 100, 500, 2000),
            V=(512, 8192, 50_000, 150_000))
PROCESSES = 1, 2


class Padded(Generate):
    """K padded rows per question: one forward pass of each model, and one backward pass."""

    def add_gradient(self, groups: list[list[Rationale]]) -> None:
        w, N = self.work, len(self.work.lengths)
        w.set_attention("sdpa")
        for example, group in zip(w.batch, groups):
            with self.phase("score"):
                logp_z, logp_y = self.logprobs(w.policy, example.x, group)
                with torch.no_grad():
                    logp0_z, _ = self.logprobs(w.reference, example.x, group)
                    reward = logp_y - w.args.beta * (logp_z - logp0_z)
                    advantage = (reward - reward.mean()) * w.args.K / (w.args.K - 1)
            with self.phase("backward"):
                (-(advantage * logp_z + logp_y).sum() / N).backward()

    def logprobs(self, model: nn.Module, x: list[int],
                 group: list[Rationale]) -> tuple[Tensor, Tensor]:
        """(K,) log-probs of the actions and of y, nats. An EOS that ended z is no token of the row:
        its probability comes from the position that predicts y's first token."""
        rows = [x + r.actions[:r.context] + r.y for r in group]
        width, first = max(map(len, rows)), len(x) - 1
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device())
        model.train(torch.is_grad_enabled())
        logits = model(ids, use_cache=False).logits.float()  # padding is on the right: causal
        model.eval()

        def of(row: Tensor, tokens: list[int], start: int) -> Tensor:
            predicted = row[start:start + len(tokens)].log_softmax(-1)
            return predicted.gather(1, torch.tensor(tokens, device=device())[:, None]).sum()
        z = [of(row, r.actions, first) for row, r in zip(logits, group)]
        y = [of(row, r.y, first + r.context) for row, r in zip(logits, group)]
        return torch.stack(z), torch.stack(y)


CANDIDATES = {OURS: Ours, "padded": Padded, "trl": Trl}


# ------------------------------------------------------------------------------ measuring
def resident_peak() -> int:
    """The most bytes that this process has held since `reset_peak`; on CUDA, of the device."""
    if device() == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def reset_peak() -> None:
    if device() == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def measure_update(name: str, sizes: dict, rounds: int) -> dict:
    """Median seconds of an update, and the peak of memory beyond the loaded models, in bytes. The
    first update counts for memory, since the others reuse what it allocated, and not for time."""
    distributed.init_distributed()
    args = SimpleNamespace(questions=QUESTIONS, K=sizes["K"], L=sizes["L"])
    work = Workload("toy", args, True, dict(vocab_size=sizes["V"]), (sizes["prompt"],) * 2)
    loop: Loop = CANDIDATES[name](work)
    reset_peak()
    before = resident_peak()
    for _ in range(1 + rounds):
        loop()
    seconds = {phase: median(run[phase] for run in loop.runs[1:]) for phase in loop.runs[0]}
    dist.destroy_process_group()
    return dict(seconds=sum(seconds.values()), phases=seconds, extra_bytes=resident_peak() - before)


def measure_point(name: str, sizes: dict, rounds: int) -> dict:
    """`measure_update` in a new process: nothing of another point is in its memory."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        try:
            return process.submit(measure_update, name, sizes, rounds).result()
        except Exception as e:  # out of memory ends the process
            return dict(note=type(e).__name__)


def measure_processes(n: int, rounds: int) -> dict:
    """Median seconds of an update of latro.py on n processes, the batch split between them."""
    with TemporaryDirectory() as out:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   f"--nproc-per-node={n}", "latro.py", "--out", out, "--steps", str(rounds + 1),
                   "--eval-questions", "1", "--lr", "0"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True,
                       env=os.environ | dict(OMP_NUM_THREADS="1"))
        rows = [json.loads(line) for line in Path(out, "metrics.jsonl").open()]
    phases = {phase: median(row["seconds"][phase] for row in rows[1:]) for phase in PHASES}
    return dict(seconds=sum(phases.values()), phases=phases)


def points() -> Iterator[tuple[str, dict]]:
    """(axis, sizes) of every point; what is not varied is as in BASE."""
    for axis, values in AXES.items():
        for value in values:
            yield axis, BASE | {axis: value}


def run(args: argparse.Namespace, setup: dict) -> list[dict]:
    """Measures every point and writes DIR/scaling.json, .md and .png."""
    args.out.mkdir(parents=True, exist_ok=True)
    names = [n for n in args.only or CANDIDATES if n != "trl" or find_spec("trl")]
    rows = []

    def add(row: dict) -> None:
        rows.append(row)
        print({k: v for k, v in row.items() if k != "phases"}, flush=True)
        (args.out / "scaling.json").write_text(json.dumps(setup | dict(rows=rows), indent=1))
    for axis, sizes in points():
        for name in names:
            point = dict(axis=axis, value=sizes[axis], candidate=name)
            add(point | measure_point(name, sizes, args.rounds))
    for n in PROCESSES if device() == "cpu" else ():
        add(dict(axis="processes", value=n, candidate=OURS) | measure_processes(n, args.rounds))
    (args.out / "scaling.md").write_text(as_table(rows))
    plot(rows, args.out / "scaling.png")
    return rows


# ------------------------------------------------------------------------------ showing
def cell(row: dict) -> str:
    if "note" in row:
        return row["note"]
    extra = f", {row['extra_bytes'] / 1e6:.0f} MB" if "extra_bytes" in row else ""
    return f"{row['seconds']:.3g} s{extra}"


def as_table(rows: list[dict]) -> str:
    """Markdown: a line for each point, seconds and extra memory of each candidate."""
    names = list(dict.fromkeys(row["candidate"] for row in rows))
    points = list(dict.fromkeys((row["axis"], row["value"]) for row in rows))
    by = {(row["axis"], row["value"], row["candidate"]): cell(row) for row in rows}
    lines = [f"| {' | '.join(['', *names])} |", "|---" * (len(names) + 1) + "|"]
    for axis, value in points:
        cells = [by.get((axis, value, name), "") for name in names]
        lines.append(f"| {axis} {value} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], png: Path) -> None:
    """Seconds above, extra memory below; a column for each axis, a line for each candidate."""
    from matplotlib.ticker import LogLocator

    from harness.figures import STYLE, looks, name_rows, new, rc_context
    rows = [row for row in rows if row["axis"] in AXES and "seconds" in row]
    axes, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("axis", "candidate"))
    units = {"seconds": lambda row: row["seconds"],
             "extra MB": lambda row: row["extra_bytes"] / 1e6}
    with rc_context(STYLE | {"font.size": 8, "xtick.labelsize": 5.5}):
        figure, panels = new(4.5, len(units), len(axes))
        for panel, ((unit, of), axis) in zip(panels, product(units.items(), axes)):
            for i, name in enumerate(names):
                own = [row for row in rows if (row["axis"], row["candidate"]) == (axis, name)]
                panel.plot([row["value"] for row in own], [of(row) for row in own],
                           label=name if panel is panels[0] else None, **looks(i))
            values = sorted({row["value"] for row in rows if row["axis"] == axis})
            panel.set(xscale="log", yscale="log", xlabel=axis)
            if axis == axes[0]:
                panel.set_ylabel(unit)
            panel.minorticks_off()
            panel.set_xticks(values, [f"{v // 1000}k" if v >= 1000 else v for v in values])
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:g}")
        name_rows(figure).savefig(png, dpi=150)
