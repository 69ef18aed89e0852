"""Times the candidates of a task in turns, and compares them with a floor.

Each candidate is first compared with a computation in higher precision, on the inputs that it is
timed on. A candidate that is wrong is not timed. Each round times every candidate once, so that a
change of clock speed affects all of them. The floor is the time of the bare matrix products, copy
or read of that shape, measured in the same rounds.
"""

import gc
import math
import time
from collections.abc import Callable
from functools import cache
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from harness.errors import UserError, short_error
from kernels import TRITON

OURS, FLOOR, WARM_UP = "ours", "floor", 2


class Task(NamedTuple):
    """What is computed, and the candidates that compute it.

    A pass is a part of the work that is timed by itself, such as forward or backward. `passes` and
    `floor` map its name to a function that prepares it and returns the function to time. That one
    is called `calls` times in a row, since it may take only microseconds.

    A task with a `report` takes seconds per call. Its check serves as the warm-up, and its
    candidates measure their own memory. gemms: the number of large matrix products in a candidate's
    last pass, by name."""

    shape: dict[str, object]
    candidates: dict[str, Callable | str]  # by name; a str says why it cannot run
    tolerance: float
    errors: Callable  # candidate -> its error, by name of the result
    passes: Callable  # candidate -> its passes, by name
    floor: dict[str, Callable]
    calls: int = 10
    report: Callable | None = None  # (name, times of its passes) -> more columns of its row
    gemms: dict[str, int] = {}


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@cache
def cache_flush_buffer() -> Tensor:
    """A buffer larger than any L2 cache: writing it evicts everything else."""
    return torch.empty(2**28, dtype=torch.uint8, device="cuda")


def time_call(prepare: Callable, calls: int) -> float:
    """Seconds per call. On a GPU the first call finds a cold L2 cache. The host queues its launches
    while the cache is being flushed, as it runs ahead of the GPU in training."""
    action = prepare()
    if device() == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            action()
        return (time.perf_counter() - start) / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cache_flush_buffer().zero_()
    start.record()
    for _ in range(calls):
        action()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def extra_bytes(prepare: Callable) -> int:
    """Peak memory of a call, beyond what was allocated before it and what it returns."""
    action = prepare()
    action()  # allocates the libraries' workspaces, which stay
    action = prepare()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gc.disable()  # freeing the garbage of earlier calls now would make this one look smaller
    try:
        returned = action()
    finally:
        gc.enable()
    peak = torch.cuda.max_memory_allocated()
    return peak - before - sum(x.nbytes for x in returned if x is not None)


def quartiles(samples: list[float]) -> dict[str, float]:
    """q1, median and q3, interpolated linearly between samples."""
    at = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    values = torch.tensor(samples, dtype=torch.float64).quantile(at)
    return dict(zip(("q1", "median", "q3"), values.tolist()))


def relative_error(x: Tensor, exact: Tensor) -> float:
    """max |x - exact| / max |exact|."""
    return float((x.to(exact.dtype) - exact).abs().max() / exact.abs().max())


def attempt(row: dict, action: Callable, *args):
    """Calls action(*args). If memory runs out, on the GPU or in one multiprocessor, or if a
    compiler fails, the row gets a note instead of a result."""
    out_of_resources = (import_module("triton.runtime.errors").OutOfResources if TRITON
                        else MemoryError)
    try:
        return action(*args)
    except (torch.OutOfMemoryError, out_of_resources) as e:
        row["note"] = str(e).split(". ")[0]  # the rest is advice
    except import_module("torch._dynamo.exc").TorchDynamoException as e:
        row["note"] = f"cannot be compiled: {short_error(e)}"


def check(task: Task, candidate: Callable, row: dict) -> None:
    """Fills in a candidate's errors and memory, or a note that its results are wrong."""
    errors = task.errors(candidate)
    row["error"] = {k: e if math.isfinite(e) else None for k, e in errors.items()}
    if wrong := [f"{k} is off by {e:.2g}" for k, e in errors.items() if not e <= task.tolerance]:
        row["note"] = "wrong: " + ", ".join(wrong)
    elif device() == "cuda" and not task.report:
        row["peak_bytes"] = {name: extra_bytes(prepare)
                             for name, prepare in task.passes(candidate).items()}


def measure(make: Callable[[], Task], only: list[str] | None, rounds: int) -> tuple[dict, list]:
    """The shape of a task, and a row for the floor and for each candidate, fastest first; those
    without times come last."""
    task = make()
    torch.compiler.reset()  # it gives up on a function that has seen many shapes
    if unknown := [name for name in only or () if name not in task.candidates]:
        raise UserError(f"--only {unknown[0]}: choose from {', '.join(task.candidates)}")
    rows = {FLOOR: dict(candidate=FLOOR, note=None)}
    passes = {FLOOR: task.floor}
    for name in only or task.candidates:
        candidate = task.candidates[name]
        missing = candidate if isinstance(candidate, str) else None
        rows[name] = row = dict(candidate=name, note=missing)
        if missing is None:
            attempt(row, check, task, candidate, row)
            passes[name] = task.passes(candidate)
    samples = {(name, p): [] for name in passes for p in task.floor}
    warm_up = 0 if task.report else WARM_UP
    for _, (name, p) in product(range(warm_up + rounds), samples):
        if rows[name]["note"] is None:
            samples[name, p].append(attempt(rows[name], time_call, passes[name][p], task.calls))
    times = {name: {p: quartiles(samples[name, p][warm_up:]) for p in task.floor}
             for name in passes if rows[name]["note"] is None}
    for name in rows:
        if name in task.gemms:
            rows[name]["gemms"] = task.gemms[name]
        if task.report and name in times:
            rows[name] |= task.report(name, times[name])
    return task.shape, compare_rows(rows, times)


def compare_rows(rows: dict[str, dict], times: dict[str, dict]) -> list[dict]:
    """The rows with their times, with the fraction of the floor's speed that they reach, and with
    their time as a multiple of ours. Sorted by the time of the last pass, the floor first."""
    medians = {name: {p: t["median"] for p, t in own.items()} for name, own in times.items()}
    ours, floor = medians.get(OURS, {}), medians[FLOOR]
    for name, own in medians.items():
        rows[name] |= dict(seconds=times[name], fraction={p: floor[p] / own[p] for p in own},
                           ratio={p: own[p] / ours[p] for p in ours})
    last = {name: [*own.values()][-1] for name, own in medians.items()} | {FLOOR: 0.0}
    return sorted(rows.values(), key=lambda row: last.get(row["candidate"], math.inf))


def table(shape: dict, rows: list[dict]) -> str:
    """Markdown: a line for each candidate, its passes in columns. Empty columns are left out."""
    def joined(row: dict, key: str, form: str, unit: float = 1) -> str:
        values = row.get(key, {}).values()
        return " / ".join("-" if v is None else f"{v / unit:{form}}" for v in values)

    def longest(key: str) -> dict:
        return max((row.get(key, {}) for row in rows), key=len)

    def short(x: float | None) -> str:
        if x is None:
            return ""
        return f"{x:.0f}" if x >= 100 else f"{x:.3g}"

    passes = [*rows[0]["seconds"]]
    figures = [*dict.fromkeys(k for row in rows for k in row.get("figures", {}))]
    unit, per_second = ("s", 1) if figures else ("ms", 1e3)
    phases = longest("phases")
    heads = ["candidate", "GEMMs", *(f"{p}, {unit}" for p in passes), "of floor", f"x {OURS}",
             f"{' / '.join(phases)}, s", *figures, "extra GB",
             f"error: {' / '.join(longest('error'))}"]
    lines = []
    for row in rows:
        if "seconds" in row:
            numbers = [[f"{per_second * t[k]:.4g}" for k in ("median", "q1", "q3")]
                       for t in row["seconds"].values()]
            times = ["{0} ({1} to {2})".format(*t) for t in numbers]
        else:  # the note takes the first of their columns
            times = [row["note"], *[""] * (len(passes) - 1)]
        lines.append([row["candidate"], str(row.get("gemms", "")), *times,
                      joined(row, "fraction", ".2f"), joined(row, "ratio", ".2f"),
                      joined(row, "phases", ".3g") if len(phases) > 1 else "",
                      *(short(row.get("figures", {}).get(k)) for k in figures),
                      joined(row, "peak_bytes", ".2f", 1e9), joined(row, "error", ".1e")])
    columns = [(head, "---", *column) for head, *column in zip(heads, *lines) if any(column)]
    title = ", ".join(f"{k} {v}" for k, v in shape.items() if v is not None)
    return "\n".join([f"**{title}**", "", *(f"| {' | '.join(x)} |" for x in zip(*columns)), "", ""])


def plot_by_model(rows: list[dict], png: Path) -> None:
    """Plots time and memory of the full pass by model, the smallest vocabulary first. A line for
    each candidate, a column of panels for each T."""
    plt = import_module("matplotlib.pyplot")
    plt.switch_backend("Agg")
    rows = [row for row in rows if "seconds" in row]
    models = sorted({(row["V"], row["D"], row["model"]) for row in rows})
    tokens, names = (list(dict.fromkeys(row[k] for row in rows)) for k in ("T", "candidate"))
    units = {"ms": lambda row: 1e3 * row["seconds"]["full"]["median"],
             "extra GB": lambda row: row.get("peak_bytes", {}).get("full", math.nan) / 1e9}
    figure, axes = plt.subplots(2, len(tokens), squeeze=False, layout="constrained",
                                sharex=True, figsize=(3 + 4 * len(tokens), 7))
    for (unit, T), axis in zip(product(units, tokens), axes.flat):
        for name in names:
            own = {row["model"]: units[unit](row) for row in rows
                   if (row["T"], row["candidate"]) == (T, name)}
            axis.plot([own.get(model, math.nan) for *_, model in models], label=name, marker=".",
                      color=f"C{names.index(name)}", linestyle=":" if name == FLOOR else "-")
        axis.set(yscale="log", title=f"T = {T}", ylabel=unit)
        axis.set_xticks(range(len(models)), [f"{name}\nV {V}, D {D}" for V, D, name in models],
                        rotation=60)
        axis.grid(alpha=0.25)
    save_figure(plt, figure, axes, png)


def plot_phases(rows: list[dict], png: Path) -> None:
    """Plots seconds by phase, stacked. A panel for each model, a bar for each timed candidate."""
    plt = import_module("matplotlib.pyplot")
    plt.switch_backend("Agg")
    rows = [row for row in rows if "phases" in row]
    models = list(dict.fromkeys(row["model"] for row in rows))
    phases = list(dict.fromkeys(phase for row in rows for phase in row["phases"]))
    figure, axes = plt.subplots(1, len(models), squeeze=False, layout="constrained",
                                figsize=(3 + 4 * len(models), 4))
    for model, axis in zip(models, axes.flat):
        own = [row for row in rows if row["model"] == model]
        names, below = [row["candidate"] for row in own], [0.0] * len(own)
        for phase in phases:
            heights = [row["phases"].get(phase, 0.0) for row in own]
            axis.bar(names, heights, bottom=below, label=phase)
            below = [a + b for a, b in zip(below, heights)]
        axis.set(title=model, ylabel="s")
        axis.tick_params(axis="x", rotation=60)
    save_figure(plt, figure, axes, png)


def save_figure(plt, figure, axes, png: Path) -> None:
    """Saves a grid of panels, with one legend at the right."""
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, -1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(png, dpi=150, facecolor="white")
    plt.close(figure)
