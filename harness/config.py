"""Command line from a dataclass: flags, presets by task, checks, what a resumed run may change."""

import argparse
import dataclasses
import json
import math
from datetime import date
from importlib.util import find_spec
from pathlib import Path

from .distributed import processes, restart_count
from .errors import UserError, short_error, usage_error

RESUMABLE_FLAGS = ("resume", "out", "micro", "checkpointing", "kernels", "keep", "timeout", "steps",
                   "epochs", "log_to")


def flag(default, help: str, choices=None, least=None, group: str = ""):
    """A field of a settings dataclass. None as default: a preset sets it, or the help says what it
    means. `least`: the smallest value allowed. `group`: the heading in --help that it begins."""
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices, min=least,
                                                            group=group))


def option(name: str) -> str:
    """The flag of a field: --eval-every of eval_every."""
    return "--" + name.replace("_", "-")


def load_run_config(cls, folder: str | Path) -> dict:
    """latro.json of a run: its "args" and its "base", pi_0; empty and None for a directory without
    one. Raises UserError for a file that this version does not write."""
    note = Path(folder, "latro.json")
    try:
        known = json.loads(note.read_text()) if note.exists() else dict(args={}, base=None)
        return dict(args=known["args"] and vars(cls(**known["args"])), base=known["base"])
    except (ValueError, TypeError, KeyError) as e:
        raise UserError(f"{note}: not what a run of this version writes ({short_error(e)})") from e


def task_defaults(cls, given: dict, presets: dict[str, dict]) -> dict:
    """Every setting as it applies to the task: the preset of the task, else the default."""
    task = given.get("task") or ("gsm8k" if "model" in given else "toy")
    ranks = given.get("plan") or processes()
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    return defaults | dict(task=task, questions=3 * ranks) | presets.get(task, {})


def make_parser(cls, defaults: dict) -> argparse.ArgumentParser:
    """The command line of a settings dataclass; each default is printed once, as it applies."""
    parser = argparse.ArgumentParser(prog="latro.py", allow_abbrev=False,
                                     usage="%(prog)s [flags]")
    group = parser
    for f in dataclasses.fields(cls):
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        how = (dict(action=argparse.BooleanOptionalAction) if f.type is bool
               else dict(type=f.type, choices=f.metadata["choices"]))
        default = defaults[f.name]
        shown = "" if default is None else f" (default: {default})"
        group.add_argument(option(f.name), default=argparse.SUPPRESS,
                            help=f.metadata["help"] + shown.replace("%", "%%"), **how)
    parser.error = usage_error
    return parser


def task_flags(cls, argv: list[str] | None) -> dict:
    """--task and --model alone, which decide what the other defaults are."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.error = usage_error
    for name in ("task", "model"):
        first.add_argument(option(name), default=argparse.SUPPRESS)
    return vars(first.parse_known_args(argv)[0])


def parse_args(cls, argv: list[str] | None, presets: dict[str, dict]):
    """Command line -> settings: what was given, else the task's preset, else the default.

    With --resume, or after a restart by torchrun, the settings are those of the run in --out, of
    which RESUMABLE_FLAGS may change. Raises UserError for anything that cannot work."""
    parser = make_parser(cls, task_defaults(cls, task_flags(cls, argv), presets))
    given = vars(parser.parse_args(argv))
    settings = task_defaults(cls, given, presets)
    out = Path(given.get("out", settings["out"]))
    run = (out / "latro.json").exists()
    if restart_count() and run:
        given["resume"] = True
    if given.get("resume") and run:
        settings = load_run_config(cls, out)["args"]
        changed = [f"{option(k)} {settings[k]} -> {v}" for k, v in given.items()
                   if k not in RESUMABLE_FLAGS and settings[k] != v]
        if changed:
            raise UserError(f"--resume: {out} began with other flags: {'; '.join(changed)};"
                            " leave them out, or start a new run with another --out")
    if "steps" in given or "epochs" in given:
        settings |= dict(steps=None, epochs=None)
    args = cls(**settings | given)
    args.date = args.date or date.today().isoformat()
    return check_args(args)


def check_args(args):
    """Refuses settings that cannot work, before anything is loaded. Returns them."""
    for f in dataclasses.fields(args):
        value, least = getattr(args, f.name), f.metadata["min"]
        if value == "":
            raise UserError(f"{option(f.name)} {value}: must not be empty")
        if least is not None and value is not None and not least <= value < math.inf:
            raise UserError(f"{option(f.name)} {value}: must be at least {least}")
    if "{question}" not in (args.prompt or "{question}"):
        raise UserError(f"--prompt {args.prompt}: must say where the question goes: {{question}}")
    if args.model is None or args.data is None:
        raise UserError(f"--task {args.task} needs --model and --data: hub ids or directories")
    if args.steps and args.epochs:
        raise UserError("--steps and --epochs both set the length: give one of them")
    if args.bound == "iwae" and args.reward != "logp":
        raise UserError(f"--bound iwae averages probabilities already: use it with --reward logp,"
                        f" not {args.reward}")
    if args.reward == "correct" and (args.credit, args.answer_weight) != ("answer", 1):
        raise UserError("--reward correct learns from all that was sampled and has no answer term:"
                        " leave out --credit and --answer-weight")
    if args.log_to and not find_spec(args.log_to):
        raise UserError(f"--log-to {args.log_to}: this package is not installed here: pip install"
                        f" {args.log_to}")
    if args.lora_rank and args.reference:
        raise UserError("--lora-rank: the frozen --model is pi_0; leave out --reference")
    if args.objective == "sft" and args.reward == "correct":
        raise UserError("--objective sft samples nothing that could be correct: leave out --reward")
    if not args.plan:
        check_out(Path(args.out), args.resume)
    try:
        date.fromisoformat(args.date)
    except ValueError as e:
        raise UserError(f"--date {args.date}: must be a day such as 2026-11-26") from e
    ranks = args.plan or processes()
    if args.questions % ranks or args.shard and ranks % args.shard:
        raise UserError(f"{ranks} processes: --questions {args.questions} must be a multiple of"
                        f" {ranks}, and --shard {args.shard} divide it")
    return args


def check_out(out: Path, resume: bool) -> None:
    """Refuses a directory whose contents a new run would overwrite."""
    if (out / "latro.json").exists():
        if not resume:
            raise UserError(f"--out {out} holds a run: --resume, or choose another name")
    elif out.is_file() or (out / "config.json").exists():
        raise UserError(f"--out {out} holds a model, or is a file: choose another name")
