"""A small real model on real data: SmolLM2-135M-Instruct learns on GSM8K, graded there and on ARC.

    python experiments/real_model.py                              from the hub, until all is done
    python experiments/real_model.py --model smollm2 --data data --minutes 9.5   one slice of it

--minutes limits one slice of the work. At its end the current run finishes its update and saves,
and the script exits with code 75. Run the same command again to continue; finished work is not
repeated. The arms, graded together with the raw model:

    warm_up      SFT on gold rationales, short: it teaches the format
    sft          SFT for as many updates as warm_up and latro_warm together
    latro_raw    LaTRO from the raw model, without any gold rationale
    latro_warm   LaTRO from the warm-up

Of each run the checkpoint with the best greedy accuracy on held-out questions is kept, the later
one of a tie. The test split is not used to choose it. The tables are {--runs}/gsm8k/eval.md and
{--runs}/arc_challenge/eval.md. Flags after -- go to every training run:

    python experiments/real_model.py --updates 2 -- --K 4 --L 32
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
TASKS = "gsm8k", "arc_challenge"
SFT = "--objective sft --questions 32 --lr 1e-5"
LATRO = "--questions 8 --K 16 --L 200 --lr 1e-5"
ARMS = {"warm_up": SFT, "sft": SFT, "latro_raw": LATRO, "latro_warm": LATRO}
ROWS = "latro_raw", "latro_warm", "warm_up"  # of the tables, after base and sft
MORE = 75  # exit code, EX_TEMPFAIL of sysexits.h: not an error, run it again


def rows(path: Path) -> list[dict]:
    """The rows of a log, without a last line that is still being written. [] if there is no log."""
    return [*map(json.loads, path.read_text().split("\n")[:-1])] if path.exists() else []


def keep_best(run: Path, best: Path) -> None:
    """Copies the model that `run` has just saved to `best`, unless an earlier one was better on the
    held-out questions. latro.py names a state only after the model has been written in full."""
    states = sorted((run / "state").glob("step-*"))
    accuracy = {row["step"]: row["greedy"] for row in rows(run / "evals.jsonl")}
    step = int(states[-1].name.removeprefix("step-")) if states else 0
    note = best / "selected.json"
    chosen = json.loads(note.read_text()) if note.exists() else dict(step=0, greedy=-1.0)
    if step in accuracy and step > chosen["step"] and accuracy[step] >= chosen["greedy"]:
        copy = best.with_name(best.name + ".new")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run, copy, ignore=shutil.ignore_patterns("state"))
        (copy / "selected.json").write_text(json.dumps(dict(step=step, greedy=accuracy[step])))
        shutil.rmtree(best, ignore_errors=True)
        os.replace(copy, best)


def run_until(deadline: float, command: list, watch=lambda: None) -> None:
    """Runs a command and calls watch() meanwhile. At the deadline, asks the command to end, waits
    for it, and exits with code MORE."""
    job = subprocess.Popen([sys.executable, *map(str, command)])
    try:
        while job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.5)
            watch()
    except KeyboardInterrupt:
        pass  # treated like the deadline
    if late := job.poll() is None:
        job.terminate()  # latro.py finishes its update and saves; eval.py has saved all it did
    code = job.wait()
    watch()
    if late:
        print("time is up: run the same command again to continue")
        sys.exit(MORE)
    if code:
        sys.exit(f"{' '.join(map(str, command))}\nfailed: see the message above;"
                 " finished work is kept")


def train(name: str, args: argparse.Namespace, deadline: float) -> None:
    """Trains an arm, or resumes it, and keeps its best checkpoint."""
    run, best = args.runs / name, args.runs / "selected" / name
    warm = args.runs / "selected" / "warm_up"
    steps = dict(warm_up=args.warm_up, sft=args.warm_up + args.updates).get(name, args.updates)
    if any(row["step"] == steps for row in rows(run / "metrics.jsonl")):
        keep_best(run, best)  # the last slice may have ended before this was done
        return
    if run.exists() and not (run / "latro.json").exists():
        shutil.rmtree(run)
    model = warm if name == "latro_warm" else args.model
    data = ["--data", Path(args.data, "gsm8k")] if args.data else []
    flags = [*ARMS[name].split(), "--task", "gsm8k", *data, "--model", model, "--steps", steps,
             "--eval-every", args.every, "--save-every", args.every, "--out", run, *args.flags]
    if (run / "latro.json").exists():
        flags.append("--resume")
    run_until(deadline, [ROOT / "latro.py", *flags], lambda: keep_best(run, best))


def grade(task: str, args: argparse.Namespace, deadline: float) -> None:
    """Grades the raw model and every arm on a task, unless that has been done."""
    out, best = args.runs / task, args.runs / "selected"
    if (out / "eval.md").exists():
        return
    data = ["--data", Path(args.data, task)] if args.data else ["--data", dict(
        gsm8k="openai/gsm8k", arc_challenge="allenai/ai2_arc")[task]]
    run_until(deadline, [
        ROOT / "eval.py", "--task", task, *data, "--base", args.model, "--sft", best / "sft",
        "--ckpt", *(best / name for name in ROWS), "--questions", args.graded,
        "--k", args.k, "--batch", args.batch, "--out", out])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", default=HUB, help=f"directory or hub id (default: {HUB})")
    add("--data", type=Path, help="directory with gsm8k/ and arc_challenge/ (default: the hub's)")
    add("--runs", type=Path, default=Path("runs/real"),
        help="directory of the runs (default: runs/real)")
    add("--minutes", type=float, default=float("inf"), help="limit of this slice (default: none)")
    add("--updates", type=int, default=250, help="updates of LaTRO (default: 250)")
    add("--warm-up", type=int, default=50, help="updates of the SFT warm-up (default: 50)")
    add("--every", type=int, default=50,
        help="updates between evaluations and checkpoints (default: 50)")
    add("--graded", type=int, default=0,
        help="graded questions of each test split; 0: all (default: 0)")
    add("--k", type=int, default=8, help="samples per question (default: 8)")
    add("--batch", type=int, default=64, help="questions graded at a time (default: 64)")
    add("flags", nargs="*", help="after --: flags of latro.py for every training run")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    for name in ARMS:
        train(name, args, deadline)
    for task in TASKS:
        grade(task, args, deadline)
        print(f"{task}\n\n{(args.runs / task / 'eval.md').read_text()}")


if __name__ == "__main__":
    main()
