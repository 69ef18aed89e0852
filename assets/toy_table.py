"""The evidence on the toy: every arm trained, all of them graded on the same questions.

    python toy/make.py --seed 1 --out runs/second    the second base, from another pretraining seed
    python assets/toy_table.py                       train what is missing, grade, print the table

An arm is latro.py with some flags, or with its credit broken on purpose (the controls). Runs are
kept in --runs, --jobs of them go on at a time, one thread each; eval.py keeps what it has graded.
What was made once is not made again. The table goes to assets/toy_table.json and .md.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402

import latro  # noqa: E402

SFT = "--objective sft --questions 32 --micro 32 --lr 1e-3 --warmup 20 --steps"
ARMS = {  # name: (seeds, flags, control)
    "LaTRO": (3, "", None),
    "SFT, as many updates": (3, "--objective sft --lr 1e-3 --warmup 5", None),
    "SFT, 19 epochs": (1, f"{SFT} 2400 --eval-every 400", None),
    "--bound iwae": (3, "--bound iwae", None),
    "--reward prob": (3, "--reward prob", None),
    "--credit full": (3, "--credit full", None),
    "--answer-weight 0": (2, "--answer-weight 0", None),
    "--answer-weight 0.1": (2, "--answer-weight 0.1", None),
    "--beta 0": (2, "--beta 0", None),
    "--beta 0.5": (2, "--beta 0.5", None),
    "--K 4": (2, "--K 4", None),
    "A = 0": (2, "", "zero"),
    "A shuffled": (2, "", "shuffled"),
    "collapse: --L 20": (2, "--L 20 --steps 100", None),
    "collapse: --lr 3e-3": (2, "--lr 3e-3 --steps 200", None),
}
SECOND = {"LaTRO, second base": (3, "", None)}


def broken_credit(control: str):
    """score_rationales with no advantage, or with that of the next rationale of the group."""
    right = latro.score_rationales

    def score(logp, logp0, z_start, y_start, end, K, beta, *, total, **options):
        s = right(logp, logp0, z_start, y_start, end, K, beta, total=total, **options)
        A = s.advantage.view(-1, K)
        A = (torch.zeros_like(A) if control == "zero" else A.roll(1, 1)).flatten()
        for n, (start, stop) in enumerate(zip(z_start.tolist(), y_start.tolist())):
            s.weights[start:stop] = A[n] / total
        return s._replace(advantage=A)

    return score


def folder(runs: Path, name: str, seed: int) -> Path:
    return runs / f"{name.strip('-').replace(' ', '_').replace('/', '')}.{seed}"


def train(base: str, name: str, seed: int, out: Path) -> None:
    """One run, from its last state where there is one."""
    torch.set_num_threads(1)
    _, flags, control = (ARMS | SECOND)[name]
    if control:
        latro.score_rationales = broken_credit(control)
    given = ["--task", "toy", "--model", base, "--out", str(out), "--seed", str(seed)]
    if latro.main(given + flags.split() + ["--resume"] * (out / "latro.json").exists()):
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
            raise SystemExit("it ended with the message above; what is done is kept")


def grade(base: str, out: Path, folders: list[Path], args: argparse.Namespace) -> dict:
    """eval.json of all runs of a base, without the replies."""
    in_turn([[sys.executable, "-m", "torch.distributed.run", "--standalone",
              "--nproc-per-node", args.jobs, HERE.parent / "eval.py", "--base", base, "--out", out,
              "--questions", args.questions, "--batch", 64, "--ckpt", *folders]], 1)
    held = json.loads((out / "eval.json").read_text())
    return {k: v for k, v in held.items() if k != "rows"}


def line(name: str, found: list[dict]) -> str:
    """Markdown: one seed's numbers, or the range over seeds."""
    cells = [name, str(len(found))]
    for column in found[0]["columns"]:
        digits = 3 if column in ("greedy", "T = 1", "maj@k") else 1 if column == "z" else 2
        means = [r["columns"][column][0] for r in found]
        ends = dict.fromkeys(f"{end(means):.{digits}f}" for end in (min, max))
        cells.append(" to ".join(ends))
    return "| " + " | ".join(cells) + " |\n"


def table(held: dict[str, dict], arms: dict, args: argparse.Namespace) -> str:
    """held: eval.json by base."""
    columns = [*held["base"]["results"]["base"]["columns"]]
    heads = ["arm", "seeds", *(c.replace("@k", "@8").replace("|", "\\|") for c in columns)]
    text = f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|\n"
    for base, of in (("base", ARMS), ("second base", SECOND)):
        found = held[base]["results"] if base in held else {}
        text += line(base, [found["base"]]) if found else ""
        for name in (n for n in of if n in arms and found):
            seeds = range(of[name][0])
            text += line(name, [found[folder(args.runs, name, s).name] for s in seeds])
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--questions", type=int, default=1000, help="of the test split; 0: all")
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--second", default="runs/second/model", help="the second base")
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, *SECOND], default=[*ARMS, *SECOND])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--one", nargs=3, metavar=("BASE", "ARM", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        base, name, seed = args.one
        return train(base, name, int(seed), folder(args.runs, name, int(seed)))
    bases = {"base": (str(HERE.parent / "toy/model"), ARMS), "second base": (args.second, SECOND)}
    todo, held = [], {}
    for base, arms in bases.values():
        todo += [[sys.executable, __file__, "--runs", args.runs, "--one", base, name, seed]
                 for name in arms if name in args.arms for seed in range(arms[name][0])
                 if not (folder(args.runs, name, seed) / "config.json").exists()]
    in_turn(todo, args.jobs)
    for which, (base, arms) in bases.items():
        folders = [folder(args.runs, name, seed) for name in arms if name in args.arms
                   for seed in range(arms[name][0])]
        if folders:
            held[which] = grade(base, args.runs / f"eval_{which.split()[0]}", folders, args)
    text = table(held, dict.fromkeys(args.arms), args)
    latro.write(HERE / "toy_table.json", json.dumps(held, indent=1))
    latro.write(HERE / "toy_table.md", text)
    print(text)


if __name__ == "__main__":
    main()
