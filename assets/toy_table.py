"""The evidence on the toy: every arm trained, and evaluated with greedy decoding and 8 samples.

    python assets/toy_table.py                       train what is missing, then print the table
    python assets/toy_table.py --split validation    the same arms on validation: what choices hang on
    python assets/toy_table.py --arms latro sft      some arms only

An arm is latro.py with some flags, or with its credit broken on purpose (the controls). Runs lie in
--runs and are kept; a row is added to assets/toy_table.jsonl when an arm has been evaluated, and is
not made again. --jobs runs at a time, one thread each.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import latro  # noqa: E402

ROWS = HERE / "toy_table.jsonl"
FIVE, TWO = range(5), range(2)
SFT = "--objective sft --questions 32 --micro 32 --steps 600 --lr 1e-3 --warmup 20"
ARMS = {  # name: (seeds, flags, control)
    "base": ([0], None, None),
    "latro": (FIVE, "", None),
    "sft": (TWO, SFT, None),
    "A = 0": (TWO, "", "zero"),
    "A shuffled": (TWO, "", "shuffled"),
    **{f"credit {c}, answer weight {w}": (TWO, f"--credit {c} --answer-weight {w}", None)
       for c in ("answer", "full") for w in (0, 0.1, 1)},
    "second base": ([0], None, None),
    "second base, latro": (FIVE, "", None),
    "second base, sft": ([0], SFT, None),
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


def evaluation(model: str, split: str, questions: int, k: int) -> dict:
    """Accuracies and log-probs of a model directory on a split."""
    args = latro.parse(["--eval-questions", str(questions), "--questions", "32", "--out", "unused"])
    reference_of = second_base() if "second" in model else args.model
    codec, _, _ = latro.prepare(args)
    rows = latro.read_rows(args, split)[:questions]
    examples = [codec.example(*row) for row in rows]
    device = torch.device("cpu")
    args.model, policy_name = reference_of, model
    reference = latro.load(args, device, torch.float32)
    args.model = policy_name
    policy = latro.load(args, device, torch.float32)
    done = latro.evaluate(policy, reference, codec, examples, args, k)
    direct = [[latro.gold_rationale(codec, e._replace(z=[]))] for e in examples]
    with torch.no_grad():
        direct = [sum(latro.score(policy, None, [e], [g], args)[0].tolist()) for e, g in zip(examples, direct)]
    samples = [s for r in done for s in r["samples"]]
    share = lambda right: sum(right) / len(right)
    return dict(
        n=len(done), greedy=share([r["right"] for r in done]), sampled=share([s["right"] for s in samples]),
        maj=share([latro.same_answer(majority([s["said"] for s in r["samples"]]), r["gold"]) for r in done]),
        logp_direct=share(direct), unique=share([len({s["text"] for s in r["samples"]}) / k for r in done]),
        **latro.summary([r["samples"] for r in done]))


def second_base() -> str:
    return os.environ.get("LATRO_SECOND_BASE", "runs/toy/second/model")


def run_arm(name: str, seed: int, split: str, runs: Path, questions: int) -> None:
    """Trains an arm unless it lies in `runs`, evaluates it, and adds its row."""
    torch.set_num_threads(1)
    _, flags, control = ARMS[name]
    base = second_base() if name.startswith("second") else str(HERE.parent / "toy/model")
    out, here = runs / f"{name.replace(' ', '_')}-{seed}", base
    if flags is not None:
        here = str(out)
        if control:
            latro.score_rationales = broken_credit(control)
        argv = ["--task", "toy", "--model", base, "--out", here, "--seed", str(seed), "--resume", *flags.split()]
        if not (out / "model.safetensors").exists() and latro.main(argv):
            raise SystemExit(f"{name}, seed {seed}: training failed")
    with open(ROWS, "a") as f:
        f.write(json.dumps(dict(arm=name, seed=seed, split=split, **evaluation(here, split, questions, 8))) + "\n")


def table(rows: list[dict]) -> str:
    """Markdown: the range over seeds where there are several."""
    head = ["arm", "seeds", "greedy", "T = 1", "maj@8", "log p(y\\|x)", "log p(y\\|x+z)", "ELBO", "KL", "length"]
    keys = ["greedy", "sampled", "maj", "logp_direct", "logp_y", "elbo", "kl", "z_len"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in ARMS:
        of = [r for r in rows if r["arm"] == name]
        cells = [name, str(len(of))]
        for key in keys:
            digits = 3 if key in ("greedy", "sampled", "maj") else 2
            low, high = (f"{f(r[key] for r in of):.{digits}f}" for f in (min, max)) if of else ("-", "-")
            cells.append(low if low == high else f"{low} to {high}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--questions", type=int, default=1000, help="at most, of the split")
    parser.add_argument("--runs", type=Path, default=Path("runs/toy"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--one", nargs=2, metavar=("ARM", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return run_arm(args.one[0], int(args.one[1]), args.split, args.runs, args.questions)
    have = lambda: [json.loads(s) for s in ROWS.read_text().splitlines()] if ROWS.exists() else []
    made = {(r["arm"], r["seed"], r["split"]) for r in have()}
    todo = [(a, s) for a in args.arms for s in ARMS[a][0] if (a, s, args.split) not in made]
    jobs: list[subprocess.Popen] = []
    while todo or jobs:
        while todo and len(jobs) < args.jobs:
            arm, seed = todo.pop(0)
            jobs.append(subprocess.Popen(
                [sys.executable, __file__, "--one", arm, str(seed), "--split", args.split, "--runs", args.runs,
                 "--questions", str(args.questions)], env=os.environ | {"OMP_NUM_THREADS": "1"}))
        if jobs.pop(0).wait():
            raise SystemExit("an arm failed; its message is above")
    print(table([r for r in have() if r["split"] == args.split]))


if __name__ == "__main__":
    main()
