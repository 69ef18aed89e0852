"""Trains every arm on the toy, grades all of them on the same questions, and draws the figures.

    python toy/make.py --seed 1 --out runs/second    a second base, from another pretraining seed
    python experiments/evidence.py                   train the runs that are missing, grade, draw
    python experiments/evidence.py --level hard      the same for the arms of the harder toy

An arm is latro.py with some flags. In the controls its credit is broken on purpose. Each run is
saved in {--runs}/{arm}.{seed}. --jobs runs train at a time, one thread each. Finished runs are not
trained again, and graded replies are kept. Tables go to --out, figures to --pictures.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from harness.checkpoint import atomic_write, read_jsonl  # noqa: E402
from harness.report import digits  # noqa: E402

BASES = ROOT / "toy/model", Path("runs/second/model"), ROOT / "toy/hard/model"
BASE, SECOND, HARD = BASES


class Arm(NamedTuple):
    seeds: int = 2
    flags: str = ""
    control: str = ""  # how the credit is broken: "zero" or "shuffled", see controls.py
    base: Path = BASE
    data: Path = BASE.parent


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
HARD_FLAGS = {
    "LaTRO": "",
    "SFT": f"{SFT} --warmup 5",
    "iwae bound": "--bound iwae",
    "prob reward": "--reward prob",
    "mean-prob reward": "--reward mean-prob",
    "correct reward": "--reward correct",
    "credit full": "--credit full",
    "answer weight 0": "--answer-weight 0",
    "answer weight 0.1": "--answer-weight 0.1",
    "beta 0": "--beta 0",
    "beta 0.5": "--beta 0.5",
    "K 4": "--K 4",
    "K 64": "--K 64",
    "L 40": "--L 40",
    "LoRA, rank 8": "--lora-rank 8 --lr 3e-3",
    "A = 0": "",
    "A shuffled": "",
}
CONTROLS = {"A = 0": "zero", "A shuffled": "shuffled"}
HARD_ARMS = {name: Arm(3, f"{flags} --eval-every 5", CONTROLS.get(name, ""), HARD, HARD.parent)
             for name, flags in HARD_FLAGS.items()}
HEADS = {"sampled": "T = 1", "maj@k": "maj@8"}  # of columns of eval.py
DIAGNOSTICS = ("template", "answer", "end", "ends", "reaches", "follows", "r ~ right", "entropy",
               "unique")


class Level(NamedTuple):
    arms: dict[str, Arm]
    tables: dict[str, tuple[str, ...]]  # the columns of each; the first names the record as well
    figures: dict = {}  # what eval.py --figures draws
    learning: tuple[str, ...] = ()  # arms of the figure of accuracy over updates


LEVELS = {
    "default": Level(ARMS, {
        "evidence": ("greedy", "sampled", "maj@k", "log p(y|x)", "log p(y|x+z)", "ELBO", "z"),
        "diagnostics": DIAGNOSTICS},
        dict(k=32, questions=300, ckpt=["LaTRO", "L 28"], sft="SFT, 19 epochs")),
    "hard": Level(HARD_ARMS, {
        "hard": ("greedy", "sampled", "maj@k", "log p(y|x+z)", "log mean p(y|x+z)", "perplexity",
                 "ELBO", "z"),
        "hard_learning": ("greedy, 10", "greedy, 25", "T = 1, 10", "T = 1, 25", "seconds"),
        "hard_diagnostics": DIAGNOSTICS},
        learning=("LaTRO", "correct reward", "prob reward", "mean-prob reward", "K 4", "K 64")),
}


def run_dir(runs: Path, name: str, seed: int = 0) -> Path:
    """The directory of an arm's run."""
    return runs / f"{name.replace(',', '').replace(' ', '_')}.{seed}"


def command(arm: Arm, seed: int, out: Path) -> list:
    """The command that trains one run, or resumes it if it has a saved state."""
    script = [ROOT / "experiments/controls.py", arm.control] if arm.control else [ROOT / "latro.py"]
    resume = ["--resume"] if (out / "latro.json").exists() else []
    return [sys.executable, *script, "--task", "toy", "--data", arm.data, "--model", arm.base,
            "--out", out, "--seed", seed, *arm.flags.split(), *resume]


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


def seconds_of_updates(out: Path) -> list[float]:
    return [sum(row["seconds"].values()) for row in read_jsonl(out / "metrics.jsonl")]


def logged(out: Path) -> dict:
    """What a run logged: its held-out accuracy by update, and the seconds of all its updates."""
    evals = read_jsonl(out / "evals.jsonl")
    return dict(seconds=sum(seconds_of_updates(out)),
                **{key: [row[key] for row in evals] for key in ("step", "greedy", "sampled")})


def means(result: dict) -> dict[str, float]:
    """A run's value by column: the means over questions of eval.py, and what the run logged."""
    found = {name: estimate[0] for name, estimate in result["columns"].items()}
    found["perplexity"] = math.exp(-found["per token"])
    if "logged" in result:
        log = result["logged"]
        found["seconds"] = log["seconds"]
        for step, greedy, sampled in zip(log["step"], log["greedy"], log["sampled"]):
            found |= {f"greedy, {step}": greedy, f"T = 1, {step}": sampled}
    return found


def number(column: str, value: float | None) -> str:
    """A value as text; the columns that eval.py lacks have their own number of digits."""
    places = {"perplexity": 2, "seconds": 0}.get(column)
    return digits(column, value) if None in (places, value) else f"{value:.{places}f}"


def table_row(name: str, columns: tuple[str, ...], seeds: list[dict]) -> str:
    """A row in Markdown: the means over questions of one seed, or their range over seeds."""
    cells = [name, str(len(seeds))]
    for column in columns:
        values = [means(result).get(column) for result in seeds]
        ends = [values[0]] if None in values else [min(values), max(values)]
        # one number if both ends look the same
        cells.append(" to ".join(dict.fromkeys(number(column, end) for end in ends)))
    return f"| {' | '.join(cells)} |\n"


def table(columns: tuple[str, ...], arms: dict[str, Arm], graded: dict[Path, dict],
          runs: Path) -> str:
    """A table in Markdown, one row per arm. graded: eval.json by base."""
    heads = ["", "seeds", *(HEADS.get(c, c).replace("|", "\\|") for c in columns)]
    text = f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|\n"
    for base, evaluation in graded.items():
        results = evaluation["results"]
        text += table_row("second base" if base == SECOND else "base", columns, [results["base"]])
        for name, arm in arms.items():
            if arm.base == base:
                seeds = [run_dir(runs, name, seed).name for seed in range(arm.seeds)]
                text += table_row(name, columns, [results[seed] for seed in seeds])
    return text


def draw(runs: Path, jobs: int, out: Path, k: int, questions: int, ckpt: list, sft: str) -> None:
    """Draws the figures of eval.py for seed 0 of these arms into `out`."""
    folder = runs / "figures"
    grade(folder, jobs, "--figures", "--k", k, "--questions", questions,
          "--sft", run_dir(runs, sft), "--ckpt", *(run_dir(runs, name) for name in ckpt))
    for file in folder.glob("*.png"):
        (out / file.name).write_bytes(file.read_bytes())


def draw_learning(arms: dict[str, Arm], runs: Path, file: Path) -> None:
    """Draws the held-out accuracy of these arms over updates."""
    from harness import figures  # late: only this needs matplotlib
    figures.draw_learning({name: [logged(run_dir(runs, name, seed)) for seed in range(arm.seeds)]
                           for name, arm in arms.items()}, file)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--level", choices=LEVELS, default="default",
                        help="of the toy, see toy/make.py (default: default)")
    parser.add_argument("--questions", type=int, default=1000,
                        help="graded questions of the test split; 0: all (default: 1000)")
    parser.add_argument("--runs", type=Path,
                        help="directory of the runs (default: runs/evidence or runs/hard)")
    parser.add_argument("--out", type=Path, default=ROOT / "experiments",
                        help="directory of the tables (default: experiments)")
    parser.add_argument("--pictures", type=Path, default=ROOT / "assets",
                        help="directory of the figures (default: assets)")
    parser.add_argument("--arms", nargs="+", help="arms to train and grade (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    args = parser.parse_args(argv)
    known = LEVELS[args.level].arms
    args.arms = args.arms or [*known]
    if unknown := [name for name in args.arms if name not in known]:
        parser.error(f"--arms: {', '.join(unknown)}: choose from {', '.join(known)}")
    args.runs = args.runs or Path("runs", "evidence" if args.level == "default" else args.level)
    return args


def train_and_grade(arms: dict[str, Arm], args: argparse.Namespace) -> dict[Path, dict]:
    """eval.json by base, with what each run logged. Finished work is not done again."""
    folders = {(name, seed): run_dir(args.runs, name, seed)
               for name, arm in arms.items() for seed in range(arm.seeds)}
    run_all([command(arms[name], seed, out) for (name, seed), out in folders.items()
             if not (out / "config.json").exists()], args.jobs)
    graded = {}
    for base in dict.fromkeys(arm.base for arm in arms.values()):
        checkpoints = [out for (name, _), out in folders.items() if arms[name].base == base]
        graded[base] = grade(args.runs / f"graded_{BASES.index(base)}", args.jobs, "--base", base,
                             "--L", 48, "--questions", args.questions, "--ckpt", *checkpoints)
        for out in checkpoints:
            graded[base]["results"][out.name]["logged"] = logged(out)
    return graded


def main() -> None:
    args = parse()
    level = LEVELS[args.level]
    arms = {name: level.arms[name] for name in args.arms}
    for name, arm in arms.items():
        if not (arm.base / "config.json").exists():
            raise SystemExit(f"{name}: no model in {arm.base}; see the top of {__file__} for how to"
                             " make it, or choose other --arms")
    graded = train_and_grade(arms, args)
    for name, columns in level.tables.items():
        text = table(columns, arms, graded, args.runs)
        atomic_write(args.out / f"{name}.md", text)
        print(text)
    record = json.dumps([*graded.values()], indent=1).replace(f"{ROOT}/", "")
    atomic_write(args.out / f"{[*level.tables][0]}.json", record)
    if level.figures:
        draw(args.runs, args.jobs, args.pictures, **level.figures)
    if drawn := {name: arms[name] for name in level.learning if name in arms}:
        draw_learning(drawn, args.runs, args.pictures / f"{args.level}.png")


if __name__ == "__main__":
    main()
