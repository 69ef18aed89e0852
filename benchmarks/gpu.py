"""All that a GPU can show, in order of value, within the minutes that one has it."""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic
from typing import NamedTuple

from harness.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
MARKS = "<!-- python -m benchmarks gpu: begin -->", "<!-- python -m benchmarks gpu: end -->"
TAIL = 4000  # characters of a part's output that are kept
LEAST = 20.0  # seconds: with less left, no part begins


class Part(NamedTuple):
    """A command of its own: what fails in it, or hangs, costs the others nothing."""

    name: str
    arguments: str  # after "python"
    minutes: float  # the most it may take


def parts(large: str, small: str, folder: Path) -> list[Part]:
    """The parts in order of value: whether it is right, how fast the kernels are, then whole loops.
    `large` is the model of the kernels' tables, `small` that of the loops."""
    def bench(name: str, options: str, minutes: float) -> Part:
        place = f"--out {shlex.quote(str(folder))}"
        return Part(name, f"-m benchmarks {name} {options} {place}", minutes)
    few = "--rounds 3"
    tiles = ("ours 'dZ of 2^28 bytes' '128x256x64, 8 warps, 4 stages'"
             " '128x128x64, 8 warps, 4 stages'")
    return [
        Part("tests", "-m pytest tests -m gpu -q", 8),
        bench("tune", f"--models {large} {few} --only {tiles}", 3),
        bench("logprob", f"--models {large} --tokens 16384 --rounds 5", 4),
        bench("score", "--rounds 5", 1),
        bench("decode", f"--models {small} {few}", 2),
        bench("update", f"--models {small} --only ours trl {few}", 5),
        bench("rollout", f"--models {small} --only ours generate static {few}", 5),
        Part("toy", f"latro.py --out {shlex.quote(str(folder / 'toy'))}", 2)]


def run_part(part: Part, seconds: float) -> dict:
    """Runs a part for at most so many seconds. What it did, and the end of its output."""
    start, command = monotonic(), [sys.executable, *shlex.split(part.arguments)]
    process = subprocess.Popen(command, cwd=ROOT, text=True, errors="replace",
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True)
    try:
        output, _ = process.communicate(timeout=seconds)
        status = "done" if process.returncode == 0 else f"failed, exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # it may have started others
        output, _ = process.communicate()
        status = f"stopped after {seconds:.0f} s"
    return dict(name=part.name, command=f"python {part.arguments}", status=status,
                seconds=round(monotonic() - start, 1), output=output[-TAIL:])


def with_results(row: dict, folder: Path) -> dict:
    """A part with the rows and the table that it wrote, if any: also one that was stopped."""
    written = {key: folder / f"{row['name']}.{suffix}"
               for key, suffix in (("results", "json"), ("table", "md"))}
    if not all(path.exists() for path in written.values()):
        return row
    # The table follows what the command does and what it ran on.
    table = written["table"].read_text("utf-8").split("\n\n", 2)[2]
    return row | dict(results=json.loads(written["results"].read_text("utf-8")), table=table)


def as_markdown(rows: list[dict], setup: dict) -> str:
    """Each part with its command, status and table, or the end of its output."""
    text = ", ".join(f"{k} {v}" for k, v in setup.items()) + "\n"
    for row in rows:
        status = f"{row['status']}, {row['seconds']} s"
        text += f"\n### {row['name']}\n\n`{row['command']}`: {status}\n\n"
        output = "```\n" + "\n".join(row["output"].strip().splitlines()[-12:]) + "\n```\n"
        text += row.get("table", output).rstrip() + "\n"
    return text


def earlier_parts(path: Path, setup: dict) -> dict[str, dict]:
    """The finished parts, by name, of an interrupted run of the same code on such a machine."""
    before = json.loads(path.read_text("utf-8")) if path.exists() else dict(parts=[])
    same = all(before.get(k) == v for k, v in setup.items() if k not in ("command", "date"))
    return {row["name"]: row for row in before["parts"] if same and row["status"] == "done"}


def run(args: argparse.Namespace, setup: dict) -> list[dict]:
    """Runs the parts that are not done yet. DIR/gpu.json and DIR/gpu.md are written after each, so
    that a machine that is taken away costs one part."""
    start, folder, written = monotonic(), args.out / "parts", args.out / "gpu.json"
    folder.mkdir(parents=True, exist_ok=True)
    done, planned = earlier_parts(written, setup), parts(*args.models, folder.resolve())
    for part in planned:
        left = 60 * args.minutes - (monotonic() - start)
        if part.name in done or left < LEAST:
            continue
        row = with_results(run_part(part, min(left, 60 * part.minutes)), folder)
        print(f"{part.name}: {row['status']}, {row['seconds']} s", flush=True)
        done[part.name] = row
        rows = [done[part.name] for part in planned if part.name in done]
        written.write_text(json.dumps(setup | dict(parts=rows), indent=1), "utf-8")
        (args.out / "gpu.md").write_text(as_markdown(rows, setup), "utf-8")
    return [*done.values()]


def insert(measured: Path, page: Path) -> None:
    """Puts a gpu.md into a page, in place of what is between its marks."""
    try:
        text, new = page.read_text("utf-8"), measured.read_text("utf-8")
    except OSError as e:
        raise UserError(f"{e.filename}: {e.strerror}; --into needs a page, and --out a directory"
                        " where `gpu` has run") from e
    begin, end = (text.find(mark) for mark in MARKS)
    if not 0 <= begin < end:
        raise UserError(f"--into {page}: has no lines {MARKS[0]} and {MARKS[1]}; add them where the"
                        " tables belong")
    page.write_text(f"{text[:begin]}{MARKS[0]}\n{new}{text[end:]}", "utf-8")
