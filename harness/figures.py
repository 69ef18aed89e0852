"""Draws the figures of eval.py --figures from their numbers, as PNG files 7 inches wide.

The background is white, also for dark pages. The colours are those of Okabe and Ito, which
colour-blind readers can tell apart; the first seven rows also have different markers.
"""

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

STYLE = {"font.size": 10, "legend.fontsize": 9, "axes.spines.top": False, "legend.frameon": False,
         "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True}
COLORS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"
MARKERS = "osD^vPX"
PANELS = (("nats", {"elbo": "ELBO", "logp_y": "log p(y|x+z)"}),
          ("accuracy", {"greedy": "greedy", "sampled": "one sample"}),
          ("length of z, tokens", {"z_len": "length"}), ("KL to the base, nats", {"kl": "KL"}))
BEFORE = {"direct": "no rationale", "sampled": "a sampled one", "given": "the gold one",
          "other": "another's gold one"}


def looks(i: int) -> dict:
    """Colour and marker of row i."""
    return dict(color=COLORS[i % len(COLORS)], marker=MARKERS[i % len(MARKERS)], markersize=5)


def new(height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(7, height), layout="constrained", facecolor="white")
    return figure, [*figure.subplots(rows, columns, squeeze=False).flat]


def name_rows(figure: Figure) -> Figure:
    """Adds a legend above the plot, where it hides nothing."""
    figure.legend(loc="outside upper center", ncols=4)
    return figure


def spread(axis: Axes, x: list, band: dict, i: int, every: int, label: str) -> None:
    """Draws row i's line and its 95 % interval. Markers are offset, so that none is hidden."""
    axis.fill_between(x, band["low"], band["high"], color=looks(i)["color"], alpha=0.15, lw=0)
    axis.plot(x, band["mean"], label=label, markevery=(i * every // 4, every), **looks(i))


def curves(numbers: dict) -> Figure:
    """A run over the questions seen: evaluations as markers, every update on a thin line."""
    figure, axes = new(5, 2, 2)
    held_out, updates = numbers["held_out"], numbers["updates"]
    for axis, (unit, names) in zip(axes, PANELS):
        for i, (key, name) in enumerate(names.items()):
            for of, how in ((updates, dict(color=looks(i)["color"], lw=0.7, alpha=0.6)),
                            (held_out, looks(i) | dict(label=name))):
                if None not in of[key]:  # no KL if beta is 0, no accuracy in updates
                    axis.plot(of["seen"], of[key], **how)
        axis.set(xlabel="questions seen", ylabel=unit)
        if len(names) > 1 and axis.lines:
            axis.legend()
    axes[1].set_ylim(0, 1.02)
    figure.suptitle("held-out questions (markers) and each update's own (thin)", fontsize=10)
    return figure


def likelihood(rows: dict[str, dict]) -> Figure:
    """A bar for each row and context of y: the template below, the answer and end above it."""
    figure, [axis] = new(3.8)
    there = [n for n in BEFORE if all(n in of for of in rows.values())]
    for i, (name, of) in enumerate(rows.items()):
        color, wide = looks(i)["color"], 0.8 / len(rows)
        at = [k + wide * (i + 0.5) - 0.4 for k in range(len(there))]
        template, answer = ([of[n][part] for n in there] for part in ("template", "answer"))
        mean, low, high = zip(*(of[n]["total"] for n in there))
        reach = np.abs(np.subtract((low, high), mean))
        axis.bar(at, template, 0.9 * wide, color=[0.5 + c / 2 for c in to_rgb(color)])
        axis.bar(at, answer, 0.9 * wide, bottom=template, color=color, label=name)
        axis.errorbar(at, mean, reach, fmt="none", color="black", lw=1, capsize=3)
        for x, m, h in zip(at, mean, high):
            axis.annotate(f"{m:.{1 if m >= 9.95 else 2}f}", (x, h), (0, 3), fontsize=8,
                          textcoords="offset points", ha="center", rotation=90 * (len(rows) > 4))
    axis.set_xticks(range(len(there)), [BEFORE[n] for n in there])
    axis.grid(visible=False, axis="x")
    axis.margins(y=0.14)  # room for the numbers above the bars, which matplotlib ignores
    none = "" if "given" in there else "\nthese data have no gold rationales"
    axis.set(xlabel="rationale before y", ylabel="mean -log p(y|x), nats", ylim=(0, None))
    axis.set_title(f"light: template; full shade: gold answer and end; 95 % interval{none}",
                   fontsize=10)
    return name_rows(figure)


def length(rows: dict[str, dict], trained: dict[str, int]) -> Figure:
    """Greedy accuracy over L, with a dashed line at each checkpoint's L of training."""
    figure, [axis] = new(3.8)
    for i, (name, band) in enumerate(rows.items()):
        x = range(1, len(band["mean"]) + 1)
        spread(axis, x, band, i, max(1, len(x) // 8), name)
        if name in trained:
            axis.axvline(trained[name], color=looks(i)["color"], ls="--", lw=1.2)
    axis.set(xlabel="L, longest rationale in tokens (dashed: the L of training)",
             ylabel="greedy accuracy", ylim=(0, 1.02))
    return name_rows(figure)


def votes(rows: dict[str, dict]) -> Figure:
    """maj@k with its 95 % interval, and pass@k as a thin dashed line."""
    figure, [axis] = new(3.8)
    for i, (name, of) in enumerate(rows.items()):
        x = range(1, len(of["maj"]["mean"]) + 1)
        spread(axis, x, of["maj"], i, max(1, len(x) // 8), name)
        axis.plot(x, of["pass"]["mean"], color=looks(i)["color"], lw=0.9, ls="--")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel="k, samples a question (thin, dashed: pass@k)", ylim=(0, 1.02),
             ylabel="accuracy of the majority, maj@k")
    return name_rows(figure)


def learning(runs: dict[str, list[dict]]) -> Figure:
    """Accuracy on held-out questions over updates: the mean over an arm's runs, and their range.
    Each run is dict(step=, greedy=, sampled=)."""
    figure, axes = new(4, 1, 2)
    for axis, (key, name) in zip(axes, PANELS[1][1].items()):
        for i, (arm, seeds) in enumerate(runs.items()):
            x, values = seeds[0]["step"], [run[key] for run in seeds]
            axis.fill_between(x, np.min(values, 0), np.max(values, 0), color=looks(i)["color"],
                              alpha=0.15, lw=0)
            axis.plot(x, np.mean(values, 0), label=None if axis is axes[1] else arm, **looks(i))
        axis.set(xlabel="updates", title=name, ylim=(0, 1.02))
    axes[0].set_ylabel("accuracy on held-out questions")
    return name_rows(figure)


def draw_learning(runs: dict[str, list[dict]], file: Path) -> None:
    """Writes the figure of `learning`."""
    with rc_context(STYLE):
        learning(runs).savefig(file, dpi=150)


def draw(numbers: dict, out: Path) -> None:
    """Writes likelihood.png, length.png, votes.png and, if there are logs, curves.png to `out`."""
    with rc_context(STYLE):
        made = dict(likelihood=likelihood(numbers["likelihood"]), votes=votes(numbers["votes"]),
                    length=length(**numbers["length"]))
        if numbers["curves"]:
            made["curves"] = curves(numbers["curves"])
        for name, figure in made.items():
            figure.savefig(out / f"{name}.png", dpi=150)
