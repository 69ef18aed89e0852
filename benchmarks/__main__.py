"""Times the fused operations and whole loops against their rivals, for the tables in docs/.

    python -m benchmarks logprob --models Llama-3.1-8B --tokens 16384 --plot
    python -m benchmarks score|sample|tune
    python -m benchmarks decode|rollout|update --models Llama-3.2-1B
    python -m benchmarks gpu --minutes 25
    python -m benchmarks scaling

Results are written to DIR/COMMAND.json and DIR/COMMAND.md after every shape. The exit code is 1 if
a candidate gave wrong results. Without CUDA the default model is a toy on the CPU, where our Triton
kernels are not timed: the interpreter's times mean nothing.
"""

import argparse
import json
import platform
import shlex
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from harness.errors import UserError

from . import gpu, scaling
from .loops import decode, measure_in_group, measure_in_subprocess, rollout, update
from .operations import MODELS, logprob, sample, score, tune
from .timing import device, measure, plot_by_model, plot_phases, table
from .work import SHAPES

COMMANDS = {  # the function that makes the tasks, and the options beyond --only, --rounds and --out
    "logprob": (logprob, ("models", "tokens", "frozen", "plot")), "score": (score, ()),
    "sample": (sample, ("models",)), "tune": (tune, ("models", "tokens", "frozen")),
    "decode": (decode, ("models", "questions", "K", "L")),
    "rollout": (rollout, ("models", "questions", "K", "L", "plot")),
    "update": (update, ("models", "questions", "K", "L", "plot"))}
LOOPS = "decode", "rollout", "update"
PACKAGES = ("torch", "triton", "liger_kernel", "cut_cross_entropy", "quack_kernels",
            "nvidia_cutlass_dsl", "cuda_tile", "transformers", "trl")


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(message)


def positive_integer(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def description(tasks) -> str:
    """The docstring of a command as one line."""
    return " ".join(tasks.__doc__.split())


def parse(argv: list[str]) -> argparse.Namespace:
    """Raises UserError for a command line that cannot work."""
    cuda = device() == "cuda"
    number = dict(type=positive_integer, metavar="N")
    options = dict(
        tokens=dict(nargs="+", type=positive_integer, metavar="T",
                    help="numbers of tokens: rows of H (default: %(default)s)"),
        frozen=dict(choices=("weight", "hidden"), help="the operand that needs no gradient"),
        questions=dict(**number, help="(default: %(default)s)"),
        K=dict(**number, help="rationales per question (default: %(default)s)"),
        L=dict(**number, help="longest rationale, tokens (default: %(default)s)"),
        plot=dict(action="store_true", help="also draw DIR/COMMAND.png"),
        only=dict(nargs="+", metavar="NAME", help="time only these candidates"),
        rounds=dict(**number, default=15,
                    help="times that each candidate is timed (default: %(default)s)"),
        out=dict(type=Path, default=Path("bench"), metavar="DIR",
                 help="directory for the results (default: %(default)s)"))
    parser = Parser(prog="python -m benchmarks", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, (tasks, flags) in COMMANDS.items():
        about, models = description(tasks), SHAPES if name in LOOPS else MODELS
        command = commands.add_parser(name, description=about, help=about.split(". ")[0])
        options["models"] = dict(nargs="+", choices=models, metavar="NAME",
                                 help=f"of {', '.join(models)} (default: %(default)s)")
        for flag in (*flags, "only", "rounds", "out"):
            command.add_argument(f"--{flag}", **options[flag])
        command.set_defaults(models=[m for m in models if (m != "toy") == cuda],
                             tokens=[4096, 16384, 32768] if cuda else [256])
    for name in LOOPS:
        commands.choices[name].set_defaults(rounds=3, K=16, questions=16 if cuda else 8,
                                            L=256 if cuda else 48)
    commands.choices["tune"].set_defaults(models=["Llama-3.1-8B", "SmolLM2-135M"], tokens=[16384])
    add_gpu_command(commands, options["out"], cuda)
    add_scaling_command(commands, options)
    return parser.parse_args(argv)


def add_gpu_command(commands, out: dict, cuda: bool) -> None:
    command = commands.add_parser("gpu", description=gpu.__doc__,
                                  help="all of these, and the tests")
    command.add_argument("--minutes", type=positive_integer, default=25, metavar="N",
                         help="in all; a later call goes on (default: %(default)s)")
    command.add_argument("--models", nargs=2, choices=SHAPES, metavar=("LARGE", "SMALL"),
                         default=["Llama-3.1-8B", "Llama-3.2-1B"] if cuda else ["toy", "toy"],
                         help="for the kernels and for the loops (default: %(default)s)")
    command.add_argument("--commit", help="of a copy of the code that has no history")
    command.add_argument("--into", type=Path, metavar="PAGE",
                         help="run nothing: put DIR/gpu.md between the marks of this page")
    command.add_argument("--out", **out)


def add_scaling_command(commands, options: dict) -> None:
    command = commands.add_parser("scaling", description=scaling.__doc__,
                                  help="how the cost of an update grows")
    command.add_argument("--only", nargs="+", choices=scaling.CANDIDATES, metavar="NAME",
                         help=f"of {', '.join(scaling.CANDIDATES)}")
    command.add_argument("--rounds", **options["rounds"] | dict(default=3))
    command.add_argument("--out", **options["out"])


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment(argv: list[str]) -> dict:
    """What a number depends on: command, date, commit, device and versions."""
    git = "git describe --always --dirty --abbrev=40 --exclude=*".split()
    commit = None
    if shutil.which("git"):
        result = subprocess.run(git, cwd=Path(__file__).parent, text=True, capture_output=True)
        commit = result.stdout.strip() or None
    return dict(
        command=shlex.join(["python", "-m", "benchmarks", *argv]),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=commit,
        device=torch.cuda.get_device_name() if device() == "cuda" else
        f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        **{package: version(package) for package in PACKAGES})


def run(args: argparse.Namespace, argv: list[str]) -> list[dict]:
    """Measures all tasks and returns their rows. Prints and writes after each task, so that an
    interrupted run keeps its results."""
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {args.out}: {e.strerror}; name a directory to write to") from None
    tasks, rows, setup = COMMANDS[args.command][0], [], environment(argv)
    header = f"{description(tasks)}\n\n{', '.join(f'{k} {v}' for k, v in setup.items())}\n\n"
    text = header
    measure_task = measure
    if args.command in LOOPS:
        measure_task = measure_in_subprocess if len(args.models) > 1 else measure_in_group
    for make in tasks(args):
        shape, measured = measure_task(make, args.only, args.rounds)
        print(table(shape, measured) if rows else header + table(shape, measured), flush=True)
        rows += [shape | row for row in measured]
        text += table(shape, measured)
        results = json.dumps(setup | dict(rows=rows), indent=1, allow_nan=False)
        (args.out / f"{args.command}.json").write_text(results)
        (args.out / f"{args.command}.md").write_text(text)
    return rows


def gpu_command(args: argparse.Namespace, argv: list[str]) -> int:
    """Exit code 1 if a part failed."""
    if args.into:
        gpu.insert(args.out / "gpu.md", args.into)
        return 0
    setup = environment(argv)
    rows = gpu.run(args, setup | dict(commit=args.commit or setup["commit"]))
    return int(any(row["status"] != "done" for row in rows))


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 1 after a line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = parse(argv)
        if args.command == "gpu":
            return gpu_command(args, argv)
        if args.command == "scaling":
            scaling.run(args, environment(argv))
            return 0
        rows = run(args, argv)
        if getattr(args, "plot", False):
            plot = plot_phases if args.command in LOOPS else plot_by_model
            plot(rows, args.out / f"{args.command}.png")
        if wrong := [row for row in rows if str(row["note"]).startswith("wrong")]:
            raise UserError(f"{wrong[0]['candidate']} is {wrong[0]['note']}; see {args.out}")
        return 0
    except UserError as e:
        message = e
    except torch.OutOfMemoryError:
        message = ("not even the inputs fit into GPU memory: choose smaller --models, or lower"
                   " --tokens, --questions, --K or --L")
    print(f"benchmarks: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
