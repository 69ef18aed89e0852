"""Proves that the minutes of a GPU are not lost: `python -m benchmarks gpu` passes over what fails
or hangs, keeps every result, and goes on where it stopped."""

import json
import os
import signal
import time

import pytest

from benchmarks import __main__ as command
from benchmarks import gpu
from conftest import PRETENDED, ROOT, TINY

FAILS, LASTS = "-c 'print(1); raise SystemExit(3)'", "-c 'import time; time.sleep(600)'"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command with these parts. Exit code, and gpu.json's parts by name."""
    def run(*parts, minutes=1):
        monkeypatch.setattr(gpu, "parts", lambda large, small, folder: [*parts])
        code = command.main(["gpu", "--minutes", str(minutes), "--out", str(tmp_path)])
        rows = json.loads((tmp_path / "gpu.json").read_text())["parts"]
        return code, {row["name"]: row for row in rows}
    return run


def test_parts_are_commands_that_parse(tmp_path):
    """Each names its options as the benchmarks do, and writes where `gpu` looks."""
    planned = gpu.parts("Llama-3.1-8B", "Llama-3.2-1B", tmp_path)
    assert [part.name for part in planned] == [
        "tests", "tune", "logprob", "score", "decode", "update", "rollout", "toy"]
    for part in planned:
        words = gpu.shlex.split(part.arguments)
        if words[:2] == ["-m", "benchmarks"]:
            args = command.parse(words[2:])
            assert args.command == part.name and args.out == tmp_path
    assert sum(part.minutes for part in planned) <= 30


LOOP = "--questions 2 --K 3 --L 12 --rounds 1"
SMALLER = {  # what makes each part quick; of two equal options the last one counts
    "tests": "-k test_memory_of_token_logprobs", "tune": "--tokens 64 --rounds 1 --only ours",
    "logprob": "--tokens 64 --rounds 1 --only ours plain", "score": "--rounds 1 --only reference",
    "decode": LOOP, "update": f"{LOOP} --only ours released",
    "rollout": f"{LOOP} --only ours generate",
    "toy": " ".join(["--steps 1", *TINY])}
if PRETENDED:  # where each process takes seconds to start; other tests run these parts in theirs
    SMALLER = {name: SMALLER[name] for name in ("tests", "score", "toy")}


@pytest.mark.gpu
def test_every_part_at_a_small_size(tmp_path, monkeypatch):
    """Each is done, from the shell, and the benchmarks leave their tables."""
    monkeypatch.delenv("REACHED_LINES", raising=False)  # other tests reach the same lines
    planned = gpu.parts
    monkeypatch.setattr(gpu, "parts", lambda *sizes: [
        part._replace(arguments=f"{part.arguments} {SMALLER[part.name]}")
        for part in planned(*sizes) if part.name in SMALLER])
    code = command.main(["gpu", "--models", "toy", "toy", "--out", str(tmp_path)])
    rows = {row["name"]: row for row in json.loads((tmp_path / "gpu.json").read_text())["parts"]}
    assert {name: row["status"] for name, row in rows.items()} == dict.fromkeys(SMALLER, "done")
    for name in set(SMALLER) - {"tests", "toy"}:
        notes = {row["candidate"]: row["note"] for row in rows[name]["results"]["rows"]}
        assert not any(note and note.startswith("wrong") for note in notes.values()), notes
    assert code == 0


def test_failures_are_passed_over(run, tmp_path):
    code, rows = run(gpu.Part("a", FAILS, 1), gpu.Part("b", "-c 'print(2 + 3)'", 1))
    assert code == 1 and list(rows) == ["a", "b"]
    assert (rows["a"]["status"], rows["a"]["output"]) == ("failed, exit code 3", "1\n")
    assert (rows["b"]["status"], rows["b"]["output"]) == ("done", "5\n")
    page = (tmp_path / "gpu.md").read_text()
    assert "failed, exit code 3" in page and "```\n5\n```" in page and "torch 2." in page


def test_a_part_that_hangs_is_stopped_with_all_that_it_started(run):
    child = "import os, subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', " \
            "'import time; time.sleep(600)']); print(p.pid, flush=True); time.sleep(600)"
    code, rows = run(gpu.Part("a", f'-c "{child}"', 2 / 60), gpu.Part("b", "-c ''", 1))
    assert code == 1 and rows["a"]["status"] == "stopped after 2 s"
    assert rows["b"]["status"] == "done"
    pid = int(rows["a"]["output"])
    for _ in range(50):
        time.sleep(0.1)
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if open(f"/proc/{pid}/stat").read().split()[2] == "Z":  # nobody has asked for its exit code
            return
    os.kill(pid, signal.SIGKILL)
    pytest.fail("its child goes on")


def test_goes_on_where_it_stopped(run, tmp_path):
    """What is done is not done again, what failed is; other code starts anew."""
    once = f"-c 'open(\"{tmp_path}/log\", \"a\").write(\"x\")'"
    run(gpu.Part("a", once, 1), gpu.Part("b", FAILS, 1))
    code, rows = run(gpu.Part("a", once, 1), gpu.Part("b", "-c ''", 1), gpu.Part("c", once, 1))
    assert code == 0 and list(rows) == ["a", "b", "c"]
    assert (tmp_path / "log").read_text() == "xx"
    written = json.loads((tmp_path / "gpu.json").read_text())
    (tmp_path / "gpu.json").write_text(json.dumps(written | dict(torch="1.0")))
    run(gpu.Part("a", once, 1))
    assert (tmp_path / "log").read_text() == "xxx"


def test_no_part_begins_when_time_is_up(run, monkeypatch):
    clock = iter([0, 10, 10, 15, 45, 45])  # start; left, start and end of a; left
    monkeypatch.setattr(gpu, "monotonic", lambda: next(clock))
    code, rows = run(gpu.Part("a", "-c ''", 1), gpu.Part("b", "-c ''", 1))
    assert code == 0 and list(rows) == ["a"]


def test_tables_and_rows_are_kept(run, tmp_path):
    """A benchmark's own table and numbers get into gpu.md and gpu.json."""
    options = f"--rounds 1 --only reference --out {tmp_path / 'parts'}"
    part = gpu.Part("score", f"-m benchmarks score {options}", 2)
    code, rows = run(part)
    assert code == 0 and {r["candidate"] for r in rows["score"]["results"]["rows"]} >= {"floor"}
    assert "| candidate | call, ms |" in (tmp_path / "gpu.md").read_text()


def test_into_a_page(run, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n" + "\nold\n".join(gpu.MARKS) + "\nafter\n")
    insert = ["gpu", "--into", str(page), "--out", str(tmp_path)]
    assert command.main(insert) == 1 and "gpu.md" in capsys.readouterr().err
    run(gpu.Part("a", "-c 'print(7)'", 1))
    for _ in range(2):
        assert command.main(insert) == 0
        text = page.read_text()
        assert text.startswith("before\n") and text.endswith("\nafter\n")
        assert "old" not in text and text.count("```\n7\n```") == 1
    page.write_text("no marks")
    assert command.main(insert) == 1 and "has no lines" in capsys.readouterr().err
    assert page.read_text() == "no marks"


def test_the_documentation_has_its_place():
    text = (ROOT / "docs/performance.md").read_text()
    assert [text.count(mark) for mark in gpu.MARKS] == [1, 1]
