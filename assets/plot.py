"""Draws a run: how its bound, accuracy and rationale length move over the questions seen.

    python latro.py --eval-every 5 --out runs/figure
    python assets/plot.py runs/figure assets/toy.png
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

PANELS = (
    ("nats", (("elbo", "ELBO"), ("logp_y", "log p(y|x+z)"))),
    ("accuracy on held-out questions", (("greedy", "greedy"), ("sampled", "one sample, T = 1"))),
    ("tokens", (("z_len", "length of z"),)),
)
COLORS = "#2a6fdb", "#d1495b"


def draw(run: Path, png: Path) -> None:
    """evals.jsonl of a run directory -> a picture with three panels."""
    rows = [json.loads(s) for s in (run / "evals.jsonl").read_text().splitlines()]
    questions = json.loads((run / "latro.json").read_text())["args"]["questions"]
    seen = [r["step"] * questions for r in rows]
    figure, axes = plt.subplots(1, len(PANELS), figsize=(11, 3.1), layout="constrained")
    for axis, (unit, lines) in zip(axes, PANELS):
        for (key, label), color in zip(lines, COLORS):
            axis.plot(seen, [r[key] for r in rows], ".-", color=color, label=label)
        axis.set(xlabel="questions seen", ylabel=unit)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    axes[1].set_ylim(0, 1)
    figure.savefig(png, dpi=150, facecolor="white")


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
