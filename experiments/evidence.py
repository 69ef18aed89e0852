"""Trains every arm on the toy, grades all of them on the same questions, and draws the figures.

    python toy/make.py --seed 1 --out runs/second    a second base, from another pretraining seed
    python experiments/evidence.py                   train the runs that are missing, grade, draw

An arm is latro.py with some flags. In the controls its credit is broken on purpose. Each run is
saved in {--runs}/{arm}.{seed}. --jobs runs train at a time, one thread each. Finished runs are not
trained again, and graded replies are kept. Tables go to --out, figures to --pictures.
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

from harness.checkpoint import atomic_write  # noqa: E402
from harness.report import digits  # noqa: E402

BASE, SECOND = ROOT / "toy/model", Path("runs/second/model")


class Arm(NamedTuple):
    seeds: int = 2
    flags: str = ""
    control: str = ""  # how the credit is broken: "zero" or "shuffled", see controls.py
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
HEADS = {"sampled": "T = 1", "maj@k": "maj@8"}  # of columns of eval.py
TABLES = {
    "evidence": ("greedy", "sampled", "maj@k", "log p(y|x)", "log p(y|x+z)", "ELBO", "z"),
    "diagnostics": ("template", "answer", "end", "ends", "reaches", "follows", "r ~ right",
                    "entropy", "unique")}
FIGURES = dict(k=32, questions=300, ckpt=["LaTRO", "L 28"], sft="SFT, 19 epochs")


def run_dir(runs: Path, name: str, seed: int = 0) -> Path:
    """The directory of an arm's run."""
    return runs / f"{name.replace(',', '').replace(' ', '_')}.{seed}"


def command(name: str, seed: int, out: Path) -> list:
    """The command that trains one run, or resumes it if it has a saved state."""
    arm = ARMS[name]
    script = [ROOT / "experiments/controls.py", arm.control] if arm.control else [ROOT / "latro.py"]
    resume = ["--resume"] if (out / "latro.json").exists() else []
    return [sys.executable, *script, "--task", "toy", "--model", arm.base, "--out", out,
            "--seed", seed, *arm.flags.split(), *resume]


def run_all(commands: list[list], jobs: int) -> None:
    """Runs all commands, `jobs` at a time, one thread each. Stops at the first that fails."""
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
                job.terminate()  # latro.py finishes its update and saves
            raise SystemExit("a command failed: see the message above; finished work is kept")


def grade(out: Path, jobs: int, *flags) -> dict:
    """Runs eval.py. Returns its eval.json without the replies."""
    run_all([[sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
              jobs, ROOT / "eval.py", "--task", "toy", "--out", out, "--batch", 64, *flags]], 1)
    graded = json.loads((out / "eval.json").read_text())
    return {key: value for key, value in graded.items() if key != "rows"}


def table_row(name: str, columns: tuple[str, ...], seeds: list[dict]) -> str:
    """A row in Markdown: the means over questions of one seed, or their range over seeds."""
    cells = [name, str(len(seeds))]
    for column in columns:
        means = [result["columns"][column][0] for result in seeds]
        ends = digits(column, min(means)), digits(column, max(means))
        cells.append(" to ".join(dict.fromkeys(ends)))  # one number if both ends look the same
    return f"| {' | '.join(cells)} |\n"


def table(columns: tuple[str, ...], arms: dict[str, Arm], graded: dict[Path, dict],
          runs: Path) -> str:
    """A table in Markdown, one row per arm. graded: eval.json by base."""
    heads = ["", "seeds", *(HEADS.get(c, c).replace("|", "\\|") for c in columns)]
    text = f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|\n"
    for base, evaluation in graded.items():
        results = evaluation["results"]
        text += table_row("base" if base == BASE else "second base", columns, [results["base"]])
        for name, arm in arms.items():
            if arm.base == base:
                seeds = [run_dir(runs, name, seed).name for seed in range(arm.seeds)]
                text += table_row(name, columns, [results[seed] for seed in seeds])
    return text


def draw(runs: Path, jobs: int, out: Path) -> None:
    """Draws the figures of eval.py for the runs in FIGURES into `out`."""
    folder = runs / "figures"
    grade(folder, jobs, "--figures", "--k", FIGURES["k"], "--questions", FIGURES["questions"],
          "--sft", run_dir(runs, FIGURES["sft"]),
          "--ckpt", *(run_dir(runs, name) for name in FIGURES["ckpt"]))
    for file in folder.glob("*.png"):
        (out / file.name).write_bytes(file.read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--questions", type=int, default=1000,
                        help="graded questions of the test split; 0: all (default: 1000)")
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"),
                        help="directory of the runs (default: runs/evidence)")
    parser.add_argument("--out", type=Path, default=ROOT / "experiments",
                        help="directory of the tables (default: experiments)")
    parser.add_argument("--pictures", type=Path, default=ROOT / "assets",
                        help="directory of the figures (default: assets)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[*ARMS],
                        help="arms to train and grade (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    args = parser.parse_args()
    arms, graded = {name: ARMS[name] for name in args.arms}, {}
    for name, arm in arms.items():
        if not (arm.base / "config.json").exists():
            raise SystemExit(f"{name}: no model in {arm.base}; see the top of {__file__} for how to"
                             " make it, or choose other --arms")
    runs = [(name, seed) for name, arm in arms.items() for seed in range(arm.seeds)]
    folders = {run: run_dir(args.runs, *run) for run in runs}
    run_all([command(*run, out) for run, out in folders.items()
             if not (out / "config.json").exists()], args.jobs)
    for base in dict.fromkeys(arm.base for arm in arms.values()):
        checkpoints = [out for run, out in folders.items() if arms[run[0]].base == base]
        folder = args.runs / f"graded_{[BASE, SECOND].index(base)}"
        graded[base] = grade(folder, args.jobs, "--base", base, "--L", 48,
                             "--questions", args.questions, "--ckpt", *checkpoints)
    for name, columns in TABLES.items():
        text = table(columns, arms, graded, args.runs)
        atomic_write(args.out / f"{name}.md", text)
        print(text)
    record = json.dumps([*graded.values()], indent=1).replace(f"{ROOT}/", "")
    atomic_write(args.out / "evidence.json", record)
    draw(args.runs, args.jobs, args.pictures)


if __name__ == "__main__":
    main()
