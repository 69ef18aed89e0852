"""Times the fused operations and whole loops against their rivals, for the tables of docs/.

    python -m benchmarks logprob --models Llama-3.1-8B --tokens 16384 --plot
    python -m benchmarks score|sample|tune
    python -m benchmarks decode|rollout|update --models Llama-3.2-1B

DIR/NAME.json and .md are written after every shape. The exit code is 1 if a candidate was wrong.
Without CUDA a toy runs on the CPU, without our kernels: an interpreter's times mean nothing.
"""

import argparse, json, platform, shlex, shutil, subprocess, sys
from datetime import datetime, timezone
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch

from harness.errors import UserError

from .loops import decode, measured, measured_apart, rollout, update
from .operations import MODELS, logprob, sample, score, tune
from .timing import bars, device, draw, measure, table
from .work import SHAPES

COMMANDS = {  # what makes the tasks, and its options besides those that all have
    "logprob": (logprob, ("models", "tokens", "frozen", "plot")), "score": (score, ()),
    "sample": (sample, ("models",)), "tune": (tune, ("models", "tokens", "frozen")),
    "decode": (decode, ("models", "questions", "K", "L")),
    "rollout": (rollout, ("models", "questions", "K", "L", "plot")),
    "update": (update, ("models", "questions", "K", "L", "plot"))}
LOOPS = "decode", "rollout", "update"


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(message)


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def parse(argv: list[str]) -> argparse.Namespace:
    cuda = device() == "cuda"
    options = dict(
        tokens=dict(nargs="+", type=count, metavar="T", help="rows of H"),
        frozen=dict(choices=("weight", "hidden"), help="what wants no gradient"),
        questions=dict(type=count, metavar="N", help="(default: %(default)s)"),
        K=dict(type=count, metavar="N", help="rationales a question (default: %(default)s)"),
        L=dict(type=count, metavar="N", help="longest rationale, tokens (default: %(default)s)"),
        plot=dict(action="store_true", help="draw it to DIR/COMMAND.png"),
        only=dict(nargs="+", metavar="NAME", help="of the candidates"),
        rounds=dict(type=count, default=15, metavar="N", help="(default: %(default)s)"),
        out=dict(type=Path, default=Path("bench"), metavar="DIR", help="(default: bench)"))
    kind = dict(formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = Parser(prog="python -m benchmarks", description=__doc__, **kind)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, (tasks, flags) in COMMANDS.items():
        about, known = " ".join(tasks.__doc__.split()), SHAPES if name in LOOPS else MODELS
        command = commands.add_parser(name, description=about, help=about.split(". ")[0])
        options |= dict(models=dict(nargs="+", choices=known, metavar="NAME",
                                    help=", ".join(known)))
        for flag in (*flags, "only", "rounds", "out"):
            command.add_argument(f"--{flag}", **options[flag])
        command.set_defaults(models=[m for m in known if (m != "toy") == cuda],
                             tokens=[4096, 16384, 32768] if cuda else [256])
    for name in LOOPS:
        commands.choices[name].set_defaults(rounds=3, K=16, questions=16 if cuda else 8,
                                            L=256 if cuda else 48)
    commands.choices["tune"].set_defaults(models=["Llama-3.1-8B", "SmolLM2-135M"], tokens=[16384])
    return parser.parse_args(argv)


def environment(argv: list[str]) -> dict:
    """What must be known of a number: command, date, commit, device, versions."""
    git = "git describe --always --dirty --abbrev=40 --exclude=*".split()
    packages = "torch", "triton", "liger_kernel", "cut_cross_entropy", "transformers", "trl"
    done = shutil.which("git") and subprocess.run(git, cwd=Path(__file__).parent, text=True,
                                                  capture_output=True)
    return dict(
        command=shlex.join(["python", "-m", "benchmarks", *argv]),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=done.stdout.strip() or None if done else None,
        device=torch.cuda.get_device_name() if device() == "cuda" else
        f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        **{package: metadata.version(package) if find_spec(package) else None
           for package in packages})


def run(args: argparse.Namespace, argv: list[str]) -> list[dict]:
    """Measures, prints and writes after every task, since a run may be cut off."""
    tasks, rows, about = COMMANDS[args.command][0], [], environment(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {args.out}: {e.strerror}; name a directory to write to") from None
    facts = ", ".join(f"{k} {v}" for k, v in about.items())
    text = f"{' '.join(tasks.__doc__.split())}\n\n{facts}\n\n"
    once = measure
    if args.command in LOOPS:
        once = measured_apart if len(args.models) > 1 else measured
    for make in tasks(args):
        shape, some = once(make, args.only, args.rounds)
        print(table(shape, some) if rows else text + table(shape, some), flush=True)
        rows, text = rows + [shape | row for row in some], text + table(shape, some)
        held = json.dumps(about | dict(rows=rows), indent=1, allow_nan=False)
        (args.out / f"{args.command}.json").write_text(held)
        (args.out / f"{args.command}.md").write_text(text)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 1 after a line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = parse(argv)
        rows = run(args, argv)
        if getattr(args, "plot", False):
            (bars if args.command in LOOPS else draw)(rows, args.out / f"{args.command}.png")
        if wrong := [row for row in rows if str(row["note"]).startswith("wrong")]:
            raise UserError(f"{wrong[0]['candidate']} is {wrong[0]['note']}; see {args.out}")
        return 0
    except UserError as e:
        why = e
    except torch.OutOfMemoryError:
        why = ("not even the inputs fit into GPU memory: choose smaller --models, or lower"
               " --tokens, --questions, --K or --L")
    print(f"benchmarks: {why}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
