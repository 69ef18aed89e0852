"""A small real model on real data: Qwen2.5-Coder-0.5B-Instruct learns on GSM8K.

    python experiments/real_model.py                              from the hub, until all is done
    python experiments/real_model.py --model qwen --data data/gsm8k

Two worked examples in the prompt show the format. The arms are trained one after another, and the
last state of each is graded on the same questions of the test split; none is selected:

    base        the model as it is
    latro       LaTRO
    sft         SFT on gold rationales, as many updates of as many questions
    shuffled    latro, with each advantage given to another rationale of its question: a control

What an arm gave is kept in --out: {arm}.json has its log, and the columns of eval.py for each
graded question; {arm}/ has its adapters, in peft's format. With these, the work can go on on
another machine. The table, table.md, and the figure, learning.png, are made from them alone.

Stop it at any time, and run the same command again to continue. An update or a batch of questions
that was not finished is lost. Flags after -- go to every run:

    python experiments/real_model.py --updates 2 -- --K 4 --L 32
"""

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch.distributed as dist  # noqa: E402

import latro  # noqa: E402
from eval import columns, compare  # noqa: E402
from experiments.evidence import seconds_of_updates  # noqa: E402
from harness.checkpoint import atomic_write, read_jsonl  # noqa: E402
from harness.data import encode, load_codec_and_train_rows, read_rows  # noqa: E402
from harness.distributed import init_distributed  # noqa: E402
from harness.errors import UserError, run_cli  # noqa: E402
from harness.lora import load_adapter  # noqa: E402
from harness.metrics import environment  # noqa: E402
from harness.report import markdown, verdict  # noqa: E402

HUB = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
FLAGS = ("--task gsm8k --shots 2 --questions 2 --K 8 --L 150 --lora-rank 1 --lr 5e-5 --warmup 5"
         " --eval-every 0 --eval-questions 8 --keep 1").split()
ARMS = {  # script, and flags of its own; the base is not trained
    "base": None,
    "latro": ("latro.py", ""),
    "sft": ("latro.py", "--objective sft --lr 1e-4"),
    "shuffled": ("experiments/controls.py shuffled", ""),
}
LOGGED = {"logp_y": "log p(y|x+z), nats", "finished": "share of z not cut by L",
          "z_len": "length of z, tokens", "kl": "KL to the base, nats"}


def where(args: argparse.Namespace) -> list:
    """The flags that name model and data."""
    return ["--model", args.model, *(["--data", args.data] if args.data else [])]


def train(name: str, args: argparse.Namespace) -> dict:
    """Trains an arm, or resumes it. Keeps its adapters, and returns the rest of what is kept."""
    run, (script, own) = args.runs / name, ARMS[name]
    if run.exists() and not (run / "latro.json").exists():
        shutil.rmtree(run)
    resume = ["--resume"] if (run / "latro.json").exists() else []
    script, *control = script.split()
    flags = [*FLAGS, *own.split(), "--steps", str(args.updates), *args.flags]
    command = [sys.executable, ROOT / script, *control, *flags, *where(args), "--out", run,
               "--save-every", args.every, *resume]
    job = subprocess.run([*map(str, command)])
    log = read_jsonl(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    if job.returncode or args.updates not in [row["step"] for row in log]:
        raise UserError(f"{name}: not trained to the end; finished updates are kept: run the same"
                        " command again to continue")
    shutil.copytree(run / "adapter", args.out / name, dirs_exist_ok=True)
    hours = sum(seconds_of_updates(run)) / 3600
    return dict(training=environment(1) | dict(flags=flags, hours=hours),
                log=[{key: row[key] for key in ("step", *LOGGED)} for row in log])


def grade(name: str, kept: dict, args: argparse.Namespace) -> None:
    """Grades the questions that are not graded yet. Keeps every batch."""
    settings = latro.parse([*map(str, [*FLAGS, *args.flags, *where(args), "--out",
                                       args.runs / "unused"])])
    # A batch is as many sequences as a rollout: see latro.evaluation_batch.
    settings = dataclasses.replace(settings, questions=args.batch, K=1 + args.k)
    codec, _ = load_codec_and_train_rows(settings)
    examples = encode(codec, read_rows(settings, "test")[:args.graded], settings)
    done, start = kept["questions"], time.monotonic()
    session = environment(1) | dict(flags=args.flags, first=len(done))
    kept["grading"].append(session)
    policy, reference = latro.load_policies(settings, init_distributed())
    if ARMS[name]:
        load_adapter(policy, args.out / name)
    else:
        reference = policy
    while len(done) < len(examples):
        which = slice(len(done), len(done) + args.batch)
        done += map(columns, latro.evaluate(policy, reference, codec, examples, settings, args.k,
                                            which))
        session["hours"] = (time.monotonic() - start) / 3600
        atomic_write(args.out / f"{name}.json", json.dumps(kept))
        print(f"{name}: {len(done)} of {len(examples)} questions graded", flush=True)
    dist.destroy_process_group()


def table(arms: dict[str, dict], k: int) -> str:
    """The table in Markdown, and a paired comparison with the base for each arm."""
    found = compare({name: kept["questions"] for name, kept in arms.items()})
    lines = [verdict(name, [*found][0], found[name]) for name in [*found][1:]]
    return "\n".join([markdown(found, k), *(f"- {line}" for line in lines)]) + "\n"


def draw(arms: dict[str, dict], png: Path) -> None:
    """What the samples of each update were like, and their mean over ten updates."""
    logs = {name: arms[name]["log"] for name in ("latro", "shuffled") if name in arms}
    if not logs:
        return
    from harness.figures import STYLE, looks, name_rows, new, rc_context
    with rc_context(STYLE):
        figure, axes = new(5, 2, 2)
        for axis, (key, text) in zip(axes, LOGGED.items()):
            for i, (name, log) in enumerate(logs.items()):
                steps, values = np.array([[row["step"], row[key]] for row in log]).T
                width = min(10, len(steps))
                mean = np.convolve(values, np.ones(width) / width, "valid")
                axis.plot(steps, values, color=looks(i)["color"], lw=0.7, alpha=0.5)
                axis.plot(steps[width - 1:], mean, color=looks(i)["color"], lw=2,
                          label=name if axis is axes[0] else None)
            axis.set(xlabel="update", ylabel=text)
        name_rows(figure).savefig(png, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", default=HUB, help=f"directory or hub id (default: {HUB})")
    add("--data", type=Path, help="directory with train.jsonl and test.jsonl (default: the hub's)")
    add("--runs", type=Path, default=Path("runs/real"),
        help="directory of the runs (default: runs/real)")
    add("--out", type=Path, default=ROOT / "experiments/real_model",
        help="directory of what is kept (default: experiments/real_model)")
    add("--arms", nargs="+", choices=ARMS, default=[*ARMS],
        help="arms to train and grade (default: all)")
    add("--updates", type=int, default=60, help="updates (default: 60)")
    add("--every", type=int, default=5, help="updates between checkpoints (default: 5)")
    add("--graded", type=int, default=500,
        help="graded questions of the test split (default: 500)")
    add("--k", type=int, default=4, help="samples per graded question (default: 4)")
    add("--batch", type=int, default=25, help="questions graded at a time (default: 25)")
    add("flags", nargs="*", help="after --: flags of latro.py for every run")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    arms = {}
    for name in args.arms:
        file = args.out / f"{name}.json"
        if not file.exists():
            trained = train(name, args) if ARMS[name] else {}
            atomic_write(file, json.dumps(trained | dict(k=args.k, grading=[], questions=[])))
        arms[name] = json.loads(file.read_text())
        if arms[name]["k"] != args.k:
            raise UserError(f"--k {args.k}: {file} has {arms[name]['k']} samples per question;"
                            " give the same number, or another --out")
        if len(arms[name]["questions"]) < args.graded:
            grade(name, arms[name], args)
    text = table(arms, args.k)
    atomic_write(args.out / "table.md", text)
    print(text)
    draw(arms, args.out / "learning.png")


if __name__ == "__main__":
    sys.exit(run_cli("real_model.py", main, "--batch, or --K or --L after --",
                     "what is finished is kept"))
