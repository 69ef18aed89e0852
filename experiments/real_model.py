"""A small real model on real data: Qwen2.5-Coder-0.5B-Instruct learns on GSM8K.

    python experiments/real_model.py                              from the hub, until all is done
    python experiments/real_model.py --model qwen --data data/gsm8k

Two worked examples in the prompt show the format. The arms are trained one after another, and each
is graded on the same questions of the test split as soon as it is trained:

    base        the model as it is
    latro       LaTRO
    sft         SFT on gold rationales, as many updates of as many questions
    shuffled    latro, with each advantage given to another rationale of its question: a control

The last state of each run is graded; none is selected. {--out}/{arm}.json is what is kept of an
arm: its log, its machine, and the columns of eval.py for every graded question. An arm that has
this file is done, wherever it was made; delete the file to repeat the arm. The table, table.md, and
the figure, learning.png, are made from these files alone.

Stop it at any time, and run the same command again to continue. A run that was killed loses at most
--every updates. Flags after -- go to every run:

    python experiments/real_model.py --updates 2 -- --K 4 --L 32
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch.distributed as dist  # noqa: E402

import eval as evaluation  # noqa: E402
import latro  # noqa: E402
from harness.checkpoint import atomic_write, read_jsonl  # noqa: E402
from harness.metrics import environment  # noqa: E402
from harness.report import markdown, verdict  # noqa: E402

HUB = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
FLAGS = ("--task gsm8k --shots 2 --questions 2 --K 8 --L 150 --lora-rank 8 --lr 5e-5 --warmup 5"
         " --eval-every 0 --eval-questions 8 --keep 1").split()
ARMS = {  # script, and flags of its own; the base is not trained
    "base": None,
    "latro": ("latro.py", ""),
    "sft": ("latro.py", "--objective sft --lr 1e-4"),
    "shuffled": ("experiments/controls.py shuffled", ""),
}
LOGGED = {"logp_y": "log p(y|x+z), nats", "finished": "share of z that end before L",
          "z_len": "length of z, tokens", "kl": "KL to the base, nats"}


def where(args: argparse.Namespace) -> list:
    """The flags that name model and data."""
    return ["--model", args.model, *(["--data", args.data] if args.data else [])]


def train(name: str, args: argparse.Namespace) -> None:
    """Trains an arm, or resumes it."""
    run, (script, own) = args.runs / name, ARMS[name]
    if run.exists() and not (run / "latro.json").exists():
        shutil.rmtree(run)
    resume = ["--resume"] if (run / "latro.json").exists() else []
    script, *control = script.split()
    command = [sys.executable, ROOT / script, *control, *FLAGS, *own.split(), *where(args),
               "--out", run, "--steps", args.updates, "--save-every", args.every, *args.flags,
               *resume]
    job = subprocess.run([*map(str, command)])
    trained = [row["step"] for row in read_jsonl(run / "metrics.jsonl")] if run.exists() else []
    if job.returncode or args.updates not in trained:
        raise SystemExit(f"{name}: not trained to the end; finished updates are kept: run the same"
                         " command again to continue")


def grade(name: str, args: argparse.Namespace) -> list[dict]:
    """The columns of eval.py for each graded question. Replies are kept in {--runs}/graded."""
    folder = args.model if name == "base" else args.runs / name
    flags = evaluation.parse([*map(str, ["--ckpt", folder, "--k", args.k, "--batch", args.batch,
                                         "--questions", args.graded])])
    settings = latro.parse([*map(str, [*FLAGS, *args.flags, *where(args), "--lora-rank", 0,
                                       "--out", args.runs / "graded"])])
    try:
        return [*map(evaluation.columns,
                     evaluation.grade({name: str(folder)}, flags, settings)[name])]
    finally:
        dist.destroy_process_group()


def record(name: str, args: argparse.Namespace) -> dict:
    """Trains and grades an arm: what is kept of it."""
    if ARMS[name]:
        train(name, args)
    questions = grade(name, args)
    log = read_jsonl(args.runs / name / "metrics.jsonl") if ARMS[name] else []
    return environment(1) | dict(
        arm=name, flags=[*FLAGS, *args.flags], k=args.k,
        training_hours=sum(sum(row["seconds"].values()) for row in log) / 3600,
        log=[{key: row[key] for key in ("step", *LOGGED)} for row in log], questions=questions)


def table(records: dict[str, dict]) -> str:
    """The table in Markdown, and a paired comparison with the base for each arm."""
    found = evaluation.compare({name: known["questions"] for name, known in records.items()})
    [k] = {known["k"] for known in records.values()}
    lines = [verdict(name, [*found][0], found[name]) for name in [*found][1:]]
    return "\n".join([markdown(found, k), *(f"- {line}" for line in lines)]) + "\n"


def draw(records: dict[str, dict], png: Path) -> None:
    """What the samples of each update were like, and their mean over ten updates."""
    import numpy as np
    from harness.figures import STYLE, looks, name_rows, new, rc_context
    logs = {name: records[name]["log"] for name in ("latro", "shuffled") if name in records}
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
        help="graded questions of the test split; 0: all (default: 500)")
    add("--k", type=int, default=4, help="samples per graded question (default: 4)")
    add("--batch", type=int, default=25, help="questions graded at a time (default: 25)")
    add("flags", nargs="*", help="after --: flags of latro.py for every run")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.arms:
        file = args.out / f"{name}.json"
        if not file.exists():
            atomic_write(file, json.dumps(record(name, args)))
    records = {name: json.loads((args.out / f"{name}.json").read_text()) for name in ARMS
               if (args.out / f"{name}.json").exists()}
    atomic_write(args.out / "table.md", table(records))
    print(table(records))
    draw(records, args.out / "learning.png")


if __name__ == "__main__":
    main()
