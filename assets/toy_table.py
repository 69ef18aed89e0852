"""The evidence on the toy: every arm trained, and evaluated with greedy decoding and 8 samples.

    python toy/make.py --seed 1 --out runs/second    the second base, from another pretraining seed
    python assets/toy_table.py                       train what is missing, print the table
    python assets/toy_table.py --choices             credit and answer weight, on validation

An arm is latro.py with some flags, or with its credit broken on purpose (the controls). Runs are
kept in --runs. An evaluated arm adds a row to assets/toy_table.jsonl and is not made again. --jobs
runs go on at a time, one thread each.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import latro  # noqa: E402

ROWS = HERE / "toy_table.jsonl"
FIVE, TWO = range(5), range(2)
SFT = "--objective sft --questions 32 --micro 32 --lr 1e-3 --warmup 20 --steps"
CHOICES = {f"credit {c}, answer weight {w}": (TWO, f"--credit {c} --answer-weight {w}", None)
           for c in ("answer", "full") for w in (0, 0.1, 1)}
ARMS = {  # name: (seeds, flags, control)
    "base": ([0], None, None),
    "latro": (FIVE, "", None),
    "sft, 5 epochs": (TWO, f"{SFT} 600", None),
    "sft, 19 epochs": ([0], f"{SFT} 2400 --eval-every 400", None),
    "A = 0": (TWO, "", "zero"),
    "A shuffled": (TWO, "", "shuffled"),
    "second base": ([0], None, None),
    "second base, latro": (FIVE, "", None),
    "second base, sft, 5 epochs": ([0], f"{SFT} 600", None),
}


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


def majority(answers: list[str]) -> str:
    """The most frequent answer that was given, the earliest of equals."""
    given = [a for a in answers if a]
    return Counter(given).most_common(1)[0][0] if given else ""


def evaluation(model: str, base: str, split: str, questions: int, k: int = 8) -> dict:
    """Accuracies, log-probs (nats) and lengths (tokens) of a model directory on a split."""
    args = latro.parse(["--model", base, "--task", "toy", "--questions", "32"])
    latro.connect()
    codec, _, _ = latro.prepare(args)
    examples = [codec.example(*row) for row in latro.read_rows(args, split)[:questions]]
    reference = latro.load(args, torch.device("cpu"), torch.float32)
    args.model = model
    policy = latro.load(args, torch.device("cpu"), torch.float32)
    done = latro.evaluate(policy, reference, codec, examples, args, k)

    @torch.no_grad()
    def log_prob_without_z(e: latro.Example) -> float:
        direct = [[latro.gold_rationale(codec, [], e.answer)]]
        return float(latro.score(policy, None, [e], direct, args)[0].sum())

    def right(r: dict) -> bool:
        return latro.same_answer(majority([s["said"] for s in r["samples"]]), r["gold"])

    def share(values) -> float:
        values = list(values)
        return sum(values) / len(values)

    return dict(
        n=len(done), greedy=share(r["right"] for r in done), maj=share(map(right, done)),
        sampled=share(s["right"] for r in done for s in r["samples"]),
        unique=share(len({s["text"] for s in r["samples"]}) / k for r in done),
        logp_direct=share(map(log_prob_without_z, examples)),
        **latro.summary([r["samples"] for r in done]))


def run_arm(name: str, seed: int, args: Namespace) -> None:
    """Trains an arm unless it lies in --runs already, evaluates it, and adds its row."""
    torch.set_num_threads(1)
    _, flags, control = (ARMS | CHOICES)[name]
    base = args.second if name.startswith("second") else str(HERE.parent / "toy/model")
    model = base if flags is None else str(args.runs / f"{name.replace(' ', '_')}-{seed}")
    if not Path(model, "config.json").exists():
        if control:
            latro.score_rationales = broken_credit(control)
        given = ["--task", "toy", "--model", base, "--out", model, "--seed", str(seed)]
        if latro.main(given + flags.split()):
            raise SystemExit(f"{name}, seed {seed}: training failed")
    row = dict(arm=name, seed=seed, split=args.split)
    with open(ROWS, "a") as f:
        f.write(json.dumps(row | evaluation(model, base, args.split, args.questions)) + "\n")


def table(rows: list[dict], arms: list[str]) -> str:
    """Markdown: the range over seeds where there are several."""
    head = ["arm", "seeds", "greedy", "T = 1", "maj@8", "log p(y\\|x)", "log p(y\\|x+z)", "ELBO",
            "KL", "length"]
    keys = ["greedy", "sampled", "maj", "logp_direct", "logp_y", "elbo", "kl", "z_len"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in arms:
        of = [r for r in rows if r["arm"] == name]
        cells = [name, str(len(of))]
        for key in keys:
            digits = 3 if key in ("greedy", "sampled", "maj") else 2
            ends = {f"{end(r[key] for r in of):.{digits}f}": 0 for end in (min, max) if of}
            cells.append(" to ".join(ends) or "not run")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--choices", action="store_true", help="other arms, on validation")
    parser.add_argument("--questions", type=int, default=1000, help="at most, of the split")
    parser.add_argument("--runs", type=Path, default=Path("runs/toy"))
    parser.add_argument("--second", default="runs/second/model", help="the second base")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--one", nargs=2, metavar=("ARM", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.split = "validation" if args.choices else "test"
    arms = {"base": ARMS["base"]} | CHOICES if args.choices else ARMS
    if args.one:
        return run_arm(args.one[0], int(args.one[1]), args)
    have = lambda: [json.loads(s) for s in ROWS.read_text().splitlines()] if ROWS.exists() else []
    made = {(r["arm"], r["seed"], r["split"]) for r in have()}
    todo = [(a, s) for a in arms for s in arms[a][0] if (a, s, args.split) not in made]
    jobs: list[subprocess.Popen] = []
    while todo or jobs:
        while todo and len(jobs) < args.jobs:
            arm, seed = todo.pop(0)
            jobs.append(subprocess.Popen(
                [sys.executable, __file__, *sys.argv[1:], "--one", arm, str(seed)],
                env=os.environ | {"OMP_NUM_THREADS": "1"}))
        time.sleep(1)
        for job in [j for j in jobs if j.poll() is not None]:
            jobs.remove(job)
            if job.returncode:
                raise SystemExit("an arm failed; its message is above")
    print(table([r for r in have() if r["split"] == args.split], list(arms)))


if __name__ == "__main__":
    main()
