"""A small real model on real data: Qwen2.5-Coder-0.5B-Instruct learns on GSM8K.

    python experiments/real_model.py                              from the hub, until all is done
    python experiments/real_model.py --model qwen --data data/gsm8k --minutes 9.5    one slice

--minutes limits one slice of the work. At its end the current run finishes its update and saves,
and the script exits with code 75. Run the same command again to continue: finished work is not
repeated, and a run that was killed loses at most --every updates. The arms, graded together with
the raw model on the test split:

    warm_up     SFT on gold rationales, short: it teaches the format
    sft         SFT from the warm-up, for as many updates of as many questions as latro
    latro       LaTRO from the warm-up
    shuffled    latro, with each advantage given to another rationale of its question: a control

The last state of each run is graded; none is selected. The table is {--runs}/graded/eval.md. Flags
after -- go to every run:

    python experiments/real_model.py --updates 2 -- --K 4 --L 32
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HUB = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
LATRO = "--questions 4 --K 8 --L 150 --lr 2e-6 --warmup 5"
ARMS = {  # script and flags
    "warm_up": ("latro.py", "--objective sft --questions 8 --L 150 --lr 1e-5 --warmup 5"),
    "sft": ("latro.py", f"{LATRO} --lr 1e-5 --objective sft"),
    "latro": ("latro.py", LATRO),
    "shuffled": ("experiments/controls.py shuffled", LATRO),
}
MORE = 75  # exit code, EX_TEMPFAIL of sysexits.h: not an error, run it again


def rows(path: Path) -> list[dict]:
    """The rows of a log, without a last line that is still being written. [] if there is no log."""
    return [*map(json.loads, path.read_text().split("\n")[:-1])] if path.exists() else []


def run_until(deadline: float, command: list) -> None:
    """Runs a command. At the deadline, asks it to end, waits for it, and exits with code MORE."""
    job = subprocess.Popen([sys.executable, *map(str, command)])
    try:
        while job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.5)
    except KeyboardInterrupt:
        pass  # treated like the deadline
    if late := job.poll() is None:
        job.terminate()  # latro.py finishes its update and saves; eval.py has saved all it did
    code = job.wait()
    if late:
        print("time is up: run the same command again to continue")
        sys.exit(MORE)
    if code:
        sys.exit(f"{' '.join(map(str, command))}\nfailed: see the message above;"
                 " finished work is kept")


def train(name: str, args: argparse.Namespace, deadline: float) -> None:
    """Trains an arm, or resumes it."""
    run, (script, flags) = args.runs / name, ARMS[name]
    warming = name == "warm_up"
    steps = args.warm_up if warming else args.updates
    if any(row["step"] == steps for row in rows(run / "metrics.jsonl")):
        return
    if run.exists() and not (run / "latro.json").exists():
        shutil.rmtree(run)
    command, *control = script.split()
    flags = [*control, *flags.split(), "--task", "gsm8k", "--steps", steps, "--out", run,
             "--model", args.model if warming else args.runs / "warm_up",
             *(["--data", args.data] if args.data else []),
             "--eval-every", args.every, "--save-every", args.every, "--keep", 1,
             "--eval-questions", args.held_out, *args.flags]
    if (run / "latro.json").exists():
        flags.append("--resume")
    run_until(deadline, [ROOT / command, *flags])


def grade(args: argparse.Namespace, deadline: float) -> None:
    """Grades the raw model and every arm, unless that has been done."""
    out = args.runs / "graded"
    if not (out / "eval.md").exists():
        run_until(deadline, [
            ROOT / "eval.py", "--task", "gsm8k", *(["--data", args.data] if args.data else []),
            "--base", args.model, "--sft", args.runs / "sft",
            "--ckpt", *(args.runs / name for name in ARMS if name != "sft"),
            "--questions", args.graded, "--k", args.k, "--batch", args.batch, "--out", out])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", default=HUB, help=f"directory or hub id (default: {HUB})")
    add("--data", type=Path, help="directory with train.jsonl and test.jsonl (default: the hub's)")
    add("--runs", type=Path, default=Path("runs/real"),
        help="directory of the runs (default: runs/real)")
    add("--minutes", type=float, default=float("inf"), help="limit of this slice (default: none)")
    add("--updates", type=int, default=60, help="updates of LaTRO (default: 60)")
    add("--warm-up", type=int, default=25, help="updates of the SFT warm-up (default: 25)")
    add("--every", type=int, default=10,
        help="updates between evaluations and checkpoints (default: 10)")
    add("--held-out", type=int, default=16, help="questions of such an evaluation (default: 16)")
    add("--graded", type=int, default=500,
        help="graded questions of the test split; 0: all (default: 500)")
    add("--k", type=int, default=4, help="samples per graded question (default: 4)")
    add("--batch", type=int, default=16, help="questions graded at a time (default: 16)")
    add("flags", nargs="*", help="after --: flags of latro.py for every run")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    for name in ARMS:
        train(name, args, deadline)
    grade(args, deadline)
    print((args.runs / "graded/eval.md").read_text())


if __name__ == "__main__":
    main()
