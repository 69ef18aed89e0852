"""Other trainers do the toy's job: TRL's RLOOTrainer, and the procedure of the released code.

    pip install "trl==1.16.*"
    python experiments/peer.py      on a machine with two idle cores; -h has the flags

Each trains the toy as latro.py does by default: the same base, questions in the same order, K, L,
beta, AdamW, learning rate and number of updates. latro.evaluate grades the weights of every fifth
update on the same held-out questions. The clock runs from the first sample of an update to the end
of its optimizer step, never during evaluation. Each run is a process of its own, alone on the
machine. Finished runs are kept in {--runs}; one that was stopped begins anew.

TRL gets its fastest setting. A probe times a few updates of every entry of SETTINGS, and the runs
take the fastest. The reward is log p(y|x+z) under the policy, from one forward pass without padding
on the left and without a mask; trainers.trl_trainer has the rest. TRL learns from this reward
alone: its gradient is that of latro.py --answer-weight 0, as a test shows. So that runs too.

The released procedure is that of benchmarks/rivals.py, with the gradient of latro.py: see there.
Its rationales end where latro.py's do, but every row decodes L tokens first.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

import latro  # noqa: E402  before transformers: see kernels/__init__.py
from matplotlib import rc_context  # noqa: E402

from experiments import trainers  # noqa: E402
from experiments.evidence import run_dir, seconds_of_updates  # noqa: E402
from harness.checkpoint import append_jsonl, atomic_write, read_jsonl  # noqa: E402
from harness.data import load_datasets  # noqa: E402
from harness.distributed import init_distributed  # noqa: E402
from harness.errors import run_cli  # noqa: E402
from harness.figures import STYLE, looks, name_rows, new  # noqa: E402
from harness.metrics import environment  # noqa: E402

OURS, SAME, (TRL, RELEASED) = "LaTRO", "LaTRO, answer weight 0", trainers.TRAIN
FLAGS = {SAME: ["--answer-weight", "0"]}  # TRL's objective
# threads: of the process. rows: of a forward pass, of questions x K in all. cache: of `generate`.
SETTINGS = {
    OURS: [dict(threads=n) for n in (1, 2)],
    SAME: [dict(threads=n) for n in (1, 2)],
    TRL: [dict(threads=n, rows=rows, cache=cache, attention=attention) for n, rows, cache, attention
          in product((1, 2), (32, 128), ("dynamic", "static"), ("sdpa", "eager"))],
    RELEASED: [dict(threads=n) for n in (1, 2)]}
PROBE = "--steps 6 --eval-every 0 --eval-questions 1".split()
HINTS = "--K, --L or --questions", "finished runs are kept"  # out of memory; any other error
REACHED = 0.95  # of a run's final accuracy


# ------------------------------------------------------------------------------ runs
def train_peer(name: str, setting: dict, args: latro.Args) -> None:
    """Trains, then evaluates. metrics.jsonl has seconds only; evals.jsonl is that of latro.py."""
    device = init_distributed()
    codec, train_set, held_out = load_datasets(args)
    batches = [latro.draw_batch(train_set, step, args) for step in range(args.steps)]
    record = trainers.Record(args)
    Path(args.out).mkdir(parents=True)
    trainers.TRAIN[name](args, codec, batches, setting, record)
    for step, seconds in enumerate(record.seconds, 1):
        append_jsonl(Path(args.out, "metrics.jsonl"), dict(step=step, seconds=seconds))
    policy, reference = latro.load_policies(args, device)
    for step, weights in {0: policy.state_dict(), **record.weights}.items():
        policy.load_state_dict(weights)
        latro.evaluate_and_log(step, policy, reference, codec, held_out, args)


def train(name: str, setting: dict, flags: list[str]) -> int:
    """Trains and evaluates with flags of latro.py. Returns the exit code."""
    if name not in trainers.TRAIN:
        return latro.main(flags)
    return run_cli("peer.py", lambda: train_peer(name, setting, latro.parse(flags)), *HINTS)


def exit_with(function: Callable[..., int], *args) -> None:
    sys.exit(function(*args))


def in_new_process(threads: int, function: Callable[..., int], *args) -> int:
    """Calls function(*args) on CPU threads. Returns its exit code. Dies with this process."""
    with patch.dict(os.environ, OMP_NUM_THREADS=str(threads), CUDA_VISIBLE_DEVICES=""):
        process = get_context("spawn").Process(target=exit_with, args=(function, *args),
                                               daemon=True)
        process.start()
    process.join()
    return process.exitcode


def run(name: str, setting: dict, out: Path, flags: list[str]) -> Path:
    """Trains and evaluates in a new process, unless that has been done. Returns its directory."""
    note = out / "setting.json"
    if not note.exists():
        print(f"{name}, {setting}: {out}", flush=True)
        shutil.rmtree(out, ignore_errors=True)  # its time must be that of a single process
        flags = [*flags, *FLAGS.get(name, []), "--out", str(out)]
        steps = latro.parse(flags).steps
        code = in_new_process(setting["threads"], train, name, setting, flags)
        if code or read_jsonl(out / "evals.jsonl")[-1]["step"] < steps:
            raise SystemExit("a run has not ended: see the message above; finished runs are kept")
        atomic_write(note, json.dumps(setting))
    return out


def probe(name: str, runs: Path, flags: list[str]) -> list[dict]:
    """The settings of a trainer with their seconds per update, fastest first."""
    timed = []
    for i, setting in enumerate(SETTINGS[name]):
        out = run(name, setting, run_dir(runs / "probe", name, i), [*flags, *PROBE])
        timed.append(setting | dict(update=median(seconds_of_updates(out)[1:])))
    return sorted(timed, key=lambda one: one["update"])


# ------------------------------------------------------------------------------ results
def curve(out: Path) -> dict[str, list]:
    """The evaluations of a run over its seconds of training."""
    rows, seconds = read_jsonl(out / "evals.jsonl"), [0.0, *np.cumsum(seconds_of_updates(out))]
    return dict(seconds=[float(seconds[row["step"]]) for row in rows],
                **{key: [row[key] for row in rows] for key in ("step", "greedy", "sampled",
                                                               "logp_y")})


def seconds_to_reach(seconds: list[float], values: list[float], fraction: float) -> float:
    """When the values first reach this fraction of the last one, linear between evaluations."""
    target = fraction * values[-1]
    i = next(i for i, value in enumerate(values) if value >= target)
    if i == 0:
        return seconds[0]
    return float(np.interp(target, values[i - 1:i + 1], seconds[i - 1:i + 1]))


def measures(of: dict[str, list]) -> dict[str, float]:
    """What the table shows of a run."""
    last = {key: of[key][-1] for key in ("greedy", "sampled", "logp_y", "seconds")}
    return last | {f"to_{key}": seconds_to_reach(of["seconds"], of[key], REACHED)
                   for key in ("greedy", "sampled")}


def table(curves: dict[str, list[dict]]) -> str:
    """Markdown: ranges over seeds. A ratio compares runs of the same seed."""
    def span(values: list[float], places: int) -> str:
        ends = (min(values), max(values)) if values else ()
        return " to ".join(dict.fromkeys(f"{v:.{places}f}" for v in ends)) or "-"

    heads = ["", "seeds", "greedy", "T = 1", "log p(y\\|x+z)"]
    for time in ("s in total", "s to 95 % of greedy", "s to 95 % of T = 1"):
        heads += [time, f"x {OURS}"]
    lines, ours = [heads, ["---"] * len(heads)], [*map(measures, curves[OURS])]
    for name, runs in curves.items():
        own = [*map(measures, runs)]
        lines.append([name, str(len(own)), *(span([one[key] for one in own], places) for key, places
                                             in dict(greedy=3, sampled=3, logp_y=2).items())])
        for key in ("seconds", "to_greedy", "to_sampled"):
            ratios = [one[key] / base[key] for one, base in zip(own, ours) if base[key]]
            lines[-1] += [span([one[key] for one in own], 1), span(ratios, 2)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(curves: dict[str, list[dict]], png: Path) -> None:
    """Greedy and T = 1 accuracy over seconds: a colour for each trainer, a line for each seed."""
    with rc_context(STYLE):
        figure, axes = new(3.4, 1, 2)
        for axis, key in zip(axes, ("greedy", "sampled")):
            for i, (name, runs) in enumerate(curves.items()):
                for n, of in enumerate(runs):
                    label = name if axis is axes[0] and n == 0 else None
                    axis.plot(of["seconds"], of[key], lw=1, label=label,
                              **looks(i) | dict(markersize=3))
            axis.set(xlabel="seconds of training", ylim=(0, 1.02),
                     ylabel=dict(greedy="greedy accuracy", sampled="accuracy at T = 1")[key])
        name_rows(figure).savefig(png, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs of each trainer (default: 3)")
    parser.add_argument("--runs", type=Path, default=Path("runs/peer"),
                        help="directory of the runs (default: runs/peer)")
    parser.add_argument("--out", type=Path, default=ROOT / "experiments",
                        help="directory of peer.json and peer.md (default: experiments)")
    parser.add_argument("--pictures", type=Path, default=ROOT / "assets",
                        help="directory of peer.png (default: assets)")
    parser.add_argument("flags", nargs="*", help="after --: flags of latro.py for every run")
    args = parser.parse_args()
    if not find_spec("trl"):
        raise SystemExit('TRL is not installed here: pip install "trl==1.16.*"')
    for folder in (args.out, args.pictures):
        folder.mkdir(parents=True, exist_ok=True)
    flags = ["--eval-every", "5", *args.flags]
    probes = {name: probe(name, args.runs, flags) for name in SETTINGS}
    curves = {name: [] for name in SETTINGS}
    for seed, name in product(range(args.seeds), SETTINGS):
        setting = {k: v for k, v in probes[name][0].items() if k != "update"}
        out = run(name, setting, run_dir(args.runs, name, seed), [*flags, "--seed", str(seed)])
        curves[name].append(curve(out))
    record = dict(environment=environment(1) | dict(trl=version("trl")),
                  flags=flags, probes=probes, curves=curves,
                  measures={name: [*map(measures, of)] for name, of in curves.items()})
    atomic_write(args.out / "peer.json", json.dumps(record, indent=1))
    atomic_write(args.out / "peer.md", table(curves))
    draw(curves, args.pictures / "peer.png")
    print(table(curves))


if __name__ == "__main__":
    sys.exit(run_cli("peer.py", main, *HINTS))
