"""The evidence on the toy: every arm trained, all of them graded on the same questions, and drawn.

    python toy/make.py --seed 1 --out runs/second    another base, from another pretraining seed
    python experiments/evidence.py                   train what is missing, grade, draw

An arm is latro.py with some flags, or with its credit broken on purpose (the controls). Its runs
are in {--runs}/{arm}.{seed}, --jobs of them go on at a time, one thread each; eval.py keeps what it
has graded. So nothing is made twice. Tables go to --out, figures to --pictures.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import latro  # noqa: E402
from harness.checkpoint import atomic_write  # noqa: E402
from harness.report import digits  # noqa: E402

BASE, SECOND = ROOT / "toy/model", Path("runs/second/model")


class Arm(NamedTuple):
    seeds: int = 2
    flags: str = ""
    control: str = ""  # how its credit is broken: see broken_credit
    base: Path = BASE


SFT = "--objective sft --lr 1e-3"
ARMS = {
    "LaTRO": Arm(3, "--eval-every 5"),
    "SFT": Arm(3, f"{SFT} --warmup 5"),
    "SFT, 19 epochs": Arm(1, f"{SFT} --questions 32 --warmup 20 --steps 2400"),
    "iwae bound": Arm(3, "--bound iwae"),
    "prob reward": Arm(3, "--reward prob"),
    "credit full": Arm(3, "--credit full"),
    "credit full, answer weight 0": Arm(2, "--credit full --answer-weight 0"),
    "answer weight 0": Arm(2, "--answer-weight 0"),
    "answer weight 0.1": Arm(2, "--answer-weight 0.1"),
    "beta 0": Arm(2, "--beta 0"),
    "beta 0.5": Arm(2, "--beta 0.5"),
    "K 4": Arm(2, "--K 4"),
    "L 28": Arm(2, "--L 28"),
    "A = 0": Arm(2, control="zero"),
    "A shuffled": Arm(2, control="shuffled"),
    "L 20, lr 1e-3": Arm(2, "--L 20 --lr 1e-3 --eval-every 5"),
    "lr 3e-3": Arm(2, "--lr 3e-3"),
    "LaTRO, second base": Arm(3, base=SECOND),
    "SFT, second base": Arm(1, f"{SFT} --warmup 5", base=SECOND),
}
TABLES = {  # columns of eval.py
    "evidence": ("greedy", "T = 1", "maj@k", "log p(y|x)", "log p(y|x+z)", "ELBO", "z"),
    "diagnostics": ("template", "answer", "end", "ends", "reaches", "follows", "r ~ right",
                    "entropy", "unique")}
DRAWN = dict(k=32, questions=300, ckpt=["LaTRO", "L 28"], sft="SFT, 19 epochs")


def broken_credit(control: str):
    """score_rationales with no advantage, or with that of the next rationale of the group."""
    right = latro.score_rationales

    def score(logp, logp0, z_start, y_start, end, K, beta, *, total, **options):
        scores = right(logp, logp0, z_start, y_start, end, K, beta, total=total, **options)
        A = scores.advantage.view(-1, K)
        A = (torch.zeros_like(A) if control == "zero" else A.roll(1, 1)).flatten()
        for n, (start, stop) in enumerate(zip(z_start.tolist(), y_start.tolist())):
            scores.token_weights[start:stop] = A[n] / total
        return scores._replace(advantage=A)

    return score


def folder(runs: Path, name: str, seed: int = 0) -> Path:
    return runs / f"{name.replace(',', '').replace(' ', '_')}.{seed}"


def train(name: str, seed: int, out: Path) -> None:
    """One run, from its last state where there is one."""
    torch.set_num_threads(1)
    arm = ARMS[name]
    if arm.control:
        latro.score_rationales = broken_credit(arm.control)
    given = ["--task", "toy", "--model", str(arm.base), "--out", str(out), "--seed", str(seed)]
    if latro.main(given + arm.flags.split() + ["--resume"] * (out / "latro.json").exists()):
        raise SystemExit(f"{name}, seed {seed}: training failed")


def in_turn(commands: list[list], jobs: int) -> None:
    """Runs commands, so many at a time, one thread each; stops at the first that fails."""
    running: list[subprocess.Popen] = []
    while commands or running:
        while commands and len(running) < jobs:
            running.append(subprocess.Popen([*map(str, commands.pop(0))],
                                            env=os.environ | {"OMP_NUM_THREADS": "1"}))
        time.sleep(1)
        ended = [job for job in running if job.poll() is not None]
        running = [job for job in running if job not in ended]
        if any(job.returncode for job in ended):
            for job in running:
                job.terminate()  # it finishes its update and saves
            raise SystemExit("it ended with the message above; what is done is kept")


def grade(out: Path, jobs: int, *flags) -> dict:
    """eval.json of an evaluation, without the replies."""
    in_turn([[sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
              jobs, ROOT / "eval.py", "--task", "toy", "--out", out, "--batch", 64, *flags]], 1)
    held = json.loads((out / "eval.json").read_text())
    return {k: v for k, v in held.items() if k != "rows"}


def line(name: str, columns: tuple[str, ...], found: list[dict]) -> str:
    """Markdown: one seed's means over the questions, or their range over seeds."""
    means = [[r["columns"][c][0] for r in found] for c in columns]
    ranges = [dict.fromkeys(digits(c, end(m)) for end in (min, max))
              for c, m in zip(columns, means)]
    return f"| {' | '.join([name, str(len(found)), *map(' to '.join, ranges)])} |\n"


def table(columns: tuple[str, ...], arms: dict[str, Arm], held: dict[Path, dict],
          runs: Path) -> str:
    """held: eval.json by base."""
    heads = ["", "seeds", *(c.replace("@k", "@8").replace("|", "\\|") for c in columns)]
    text = f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|\n"
    for base, of in held.items():
        found = of["results"]
        text += line("base" if base == BASE else "second base", columns, [found["base"]])
        for name in (n for n, arm in arms.items() if arm.base == base):
            seeds = [folder(runs, name, s).name for s in range(arms[name].seeds)]
            text += line(name, columns, [found[seed] for seed in seeds])
    return text


def draw(runs: Path, jobs: int, out: Path) -> None:
    """The figures of eval.py for DRAWN."""
    made = runs / "figures"
    grade(made, jobs, "--figures", "--k", DRAWN["k"], "--questions", DRAWN["questions"], "--sft",
          folder(runs, DRAWN["sft"]), "--ckpt", *(folder(runs, name) for name in DRAWN["ckpt"]))
    for file in made.glob("*.png"):
        (out / file.name).write_bytes(file.read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--questions", type=int, default=1000, help="of the test split; 0: all")
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--out", type=Path, default=ROOT / "experiments", help="of the tables")
    parser.add_argument("--pictures", type=Path, default=ROOT / "assets", help="of the figures")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[*ARMS])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--one", nargs=2, metavar=("ARM", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, seed = args.one
        return train(name, int(seed), folder(args.runs, name, int(seed)))
    arms, held = {name: ARMS[name] for name in args.arms}, {}
    for name, arm in arms.items():
        if not (arm.base / "config.json").exists():
            raise SystemExit(f"{name}: no model in {arm.base}; make it as {__file__} says at its"
                             " top, or choose other --arms")
    runs = [(name, seed) for name, arm in arms.items() for seed in range(arm.seeds)]
    in_turn([[sys.executable, __file__, "--runs", args.runs, "--one", *run] for run in runs
             if not (folder(args.runs, *run) / "config.json").exists()], args.jobs)
    for base in dict.fromkeys(arm.base for arm in arms.values()):
        own = [folder(args.runs, *run) for run in runs if arms[run[0]].base == base]
        held[base] = grade(args.runs / f"graded_{[BASE, SECOND].index(base)}", args.jobs, "--base",
                           base, "--L", 48, "--questions", args.questions, "--ckpt", *own)
    for name, columns in TABLES.items():
        text = table(columns, arms, held, args.runs)
        atomic_write(args.out / f"{name}.md", text)
        print(text)
    record = json.dumps([*held.values()], indent=1).replace(f"{ROOT}/", "")
    atomic_write(args.out / "evidence.json", record)
    draw(args.runs, args.jobs, args.pictures)


if __name__ == "__main__":
    main()
