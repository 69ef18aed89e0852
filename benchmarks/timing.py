"""Times candidates for one task in turns, and reports them together with a floor.

Every candidate is first compared with a wider computation on the inputs it is timed on; one that is
wrong is not timed. Rounds go from candidate to candidate, so that a drifting clock affects all of
them. The floor is the time of the bare matrix products, copy or read of that shape, measured in the
same rounds.
"""

import math, time
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
    """What is computed, and by which candidates. A pass maps its name to a function that prepares
    it and returns what is timed, `calls` times in a row if one takes microseconds.

    A candidate with a report takes seconds: the run that is checked has warmed it up, and it
    measures its own memory."""

    shape: dict[str, object]
    candidates: dict[str, Callable | str]  # by name; a str says why there is none
    tolerance: float
    errors: Callable  # candidate -> by name of the result
    passes: Callable  # candidate -> by name of the pass
    floor: dict[str, Callable]
    calls: int = 10
    report: Callable | None = None  # name, times of its passes -> more of the candidate's row


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@cache
def scratch() -> Tensor:
    return torch.empty(2**28, dtype=torch.uint8, device="cuda")


def seconds(prepare: Callable, calls: int) -> float:
    """Seconds of one call, from a cold L2 cache. While the cache is emptied, the host gets ahead
    with its launches, as it does in training."""
    action = prepare()
    if device() == "cpu":
        first = time.perf_counter()
        for _ in range(calls):
            action()
        return (time.perf_counter() - first) / calls
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    scratch().zero_()
    first.record()
    for _ in range(calls):
        action()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / calls


def extra_bytes(prepare: Callable) -> int:
    """The peak of a call, beyond what was allocated before and what it returns."""
    action = prepare()
    action()  # workspaces are there from now on
    action = prepare()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    returned = action()
    peak = torch.cuda.max_memory_allocated()
    return peak - before - sum(x.nbytes for x in returned if x is not None)


def quartiles(samples: list[float]) -> dict[str, float]:
    """Interpolated linearly between samples."""
    at = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    values = torch.tensor(samples, dtype=torch.float64).quantile(at)
    return dict(zip(("q1", "median", "q3"), values.tolist()))


def relative(x: Tensor, truth: Tensor) -> float:
    """max |x - truth| / max |truth|."""
    return float((x.to(truth.dtype) - truth).abs().max() / truth.abs().max())


def attempt(row: dict, action: Callable, *args):
    """Too little memory, of the GPU or of one multiprocessor, is a result, as is a compiler that
    fails: a note in the row."""
    short = import_module("triton.runtime.errors").OutOfResources if TRITON else MemoryError
    try:
        return action(*args)
    except (torch.OutOfMemoryError, short) as e:
        row["note"] = str(e).split(". ")[0]  # advice follows
    except import_module("torch._dynamo.exc").TorchDynamoException as e:
        row["note"] = f"cannot be compiled: {short_error(e)}"


def check(task: Task, fn: Callable, row: dict) -> None:
    """Errors and memory of a candidate, or a note that it computes something else."""
    errors = task.errors(fn)
    row["error"] = {k: e if math.isfinite(e) else None for k, e in errors.items()}
    if wrong := [f"{k} is off by {e:.2g}" for k, e in errors.items() if not e <= task.tolerance]:
        row["note"] = "wrong: " + ", ".join(wrong)
    elif device() == "cuda" and not task.report:
        row["peak_bytes"] = {p: extra_bytes(prepare) for p, prepare in task.passes(fn).items()}


def measure(make: Callable[[], Task], only: list[str] | None, rounds: int) -> tuple[dict, list]:
    """The shape, and a row for the floor and for each candidate: the timed ones first, by time."""
    task = make()
    torch.compiler.reset()  # it gives up on a function that has seen many shapes
    if unknown := [name for name in only or () if name not in task.candidates]:
        raise UserError(f"--only {unknown[0]}: choose from {', '.join(task.candidates)}")
    rows = {FLOOR: dict(candidate=FLOOR, note=None)}
    jobs = {FLOOR: task.floor}
    for name in only or task.candidates:
        fn = task.candidates[name]
        rows[name] = row = dict(candidate=name, note=fn if isinstance(fn, str) else None)
        if callable(fn):
            attempt(row, check, task, fn, row)
            jobs[name] = task.passes(fn)
    samples = {(name, p): [] for name in jobs for p in task.floor}
    warm_up = 0 if task.report else WARM_UP
    for _, (name, p) in product(range(warm_up + rounds), samples):
        if rows[name]["note"] is None:
            samples[name, p].append(attempt(rows[name], seconds, jobs[name][p], task.calls))
    times = {name: {p: quartiles(samples[name, p][warm_up:]) for p in task.floor}
             for name in jobs if rows[name]["note"] is None}
    for name in times if task.report else ():
        rows[name] |= task.report(name, times[name])
    return task.shape, compared(rows, times)


def compared(rows: dict[str, dict], times: dict[str, dict]) -> list[dict]:
    """Rows with times, the fraction of the floor that they reach, and the ratio to ours; sorted."""
    median = {name: {p: t["median"] for p, t in own.items()} for name, own in times.items()}
    ours, floor = median.get(OURS, {}), median[FLOOR]
    for name, own in median.items():
        rows[name] |= dict(seconds=times[name], fraction={p: floor[p] / own[p] for p in own},
                           ratio={p: own[p] / ours[p] for p in ours})
    last = {name: [*own.values()][-1] for name, own in median.items()} | {FLOOR: 0.0}
    return sorted(rows.values(), key=lambda row: last.get(row["candidate"], math.inf))


def table(shape: dict, rows: list[dict]) -> str:
    """Markdown: a line for each candidate, passes side by side, without columns that are empty."""
    def joined(row: dict, key: str, form: str, unit: float = 1) -> str:
        values = row.get(key, {}).values()
        return " / ".join("-" if v is None else f"{v / unit:{form}}" for v in values)

    def longest(key: str) -> dict:
        return max((row.get(key, {}) for row in rows), key=len)

    def short(x: float | None) -> str:
        return "" if x is None else f"{x:.0f}" if x >= 100 else f"{x:.3g}"

    passes, figures = list(rows[0]["seconds"]), {k: 0 for r in rows for k in r.get("figures", {})}
    unit, per_s = ("s", 1) if figures else ("ms", 1e3)
    heads = ["candidate", *(f"{p}, {unit}" for p in passes), "of floor", f"x {OURS}",
             f"{' / '.join(longest('phases'))}, s", *figures, "extra GB",
             f"error: {' / '.join(longest('error'))}"]
    lines = []
    for row in rows:
        times = [[f"{per_s * t[k]:.4g}" for k in ("median", "q1", "q3")]
                 for t in row.get("seconds", {}).values()]
        lines.append([row["candidate"], *("{0} ({1} to {2})".format(*t) for t in times),
                      *([row["note"]] + [""] * len(passes))[:0 if times else len(passes)],
                      joined(row, "fraction", ".2f"), joined(row, "ratio", ".2f"),
                      joined(row, "phases", ".3g") if len(longest("phases")) > 1 else "",
                      *(short(row.get("figures", {}).get(k)) for k in figures),
                      joined(row, "peak_bytes", ".2f", 1e9), joined(row, "error", ".1e")])
    columns = [(head, "---", *column) for head, *column in zip(heads, *lines) if any(column)]
    title = ", ".join(f"{k} {v}" for k, v in shape.items() if v is not None)
    return "\n".join([f"**{title}**", "", *(f"| {' | '.join(x)} |" for x in zip(*columns)), "", ""])


def draw(rows: list[dict], png: Path) -> None:
    """Time and memory of the full pass by model, the smallest vocabulary first; one line for each
    candidate, one column of panels for each T."""
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
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, -1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(png, dpi=150, facecolor="white")
    plt.close(figure)


def bars(rows: list[dict], png: Path) -> None:
    """Seconds by phase, stacked: a panel for each model, a bar for each candidate with times."""
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
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, -1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(png, dpi=150, facecolor="white")
    plt.close(figure)
