"""Proves that README and docs/ show what is there: the loop, commands that parse, links, no
gaps."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import latro  # noqa: F401  before transformers: see kernels/__init__.py
import eval as grading
from benchmarks import __main__ as benchmarks
from conftest import ROOT
from experiments import evidence
from harness import config
from toy import make

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXTERNAL = "pip", "git", "cd", "time"  # commands that are not this project's


def commands(text: str) -> list[str]:
    """Every command of a page: lines of ```bash blocks, and inline code that starts a program."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        block = re.sub(r' -c "[^"]*"', "", block.replace("\\\n", " "))
        found += [re.sub(r"\s+#.*", "", line) for line in block.splitlines()]
    inline = re.findall(r"`((?:python|torchrun)\s[^`]*)`", re.sub(r"```.*?```", "", text,
                                                                  flags=re.DOTALL))
    found += [" ".join(code.split()) for code in inline]
    parts = [part.strip() for line in found for part in line.split("&&")]
    return [part for part in parts if part]


CASES = sorted({command for page in PAGES for command in commands(page.read_text())})


def check(words: list[str]) -> None:
    """Parses a command with the parser of its own program, or asks that program for --help."""
    program, flags = words[0], words[1:]
    if program == "latro.py":
        config.make_parser(latro.Args, config.task_defaults(latro.Args, {}, latro.PRESETS)
                           ).parse_args([flag for flag in flags if flag != "--help"])
    elif program == "eval.py":
        grading.parse(flags)
    elif program == "benchmarks":
        if flags:
            benchmarks.parse(flags)
    elif program == "toy/make.py":
        make.parse_args(flags)
    elif program == "experiments/evidence.py":
        evidence.parse(flags)
    elif program == "pytest":
        for path in (flag for flag in flags if not flag.startswith("-")):
            assert path in ("gpu", "real", "slow") or (ROOT / path).exists(), path
    else:
        assert (ROOT / program).is_file(), program
        text = (ROOT / program).read_text()
        for flag in (flag for flag in flags if flag.startswith("--")):
            assert f'"{flag}"' in text, flag


@pytest.mark.parametrize("command", CASES)
def test_commands(command):
    words = shlex.split(command)
    while "=" in words[0]:  # environment variables
        words = words[1:]
    if words[0] in EXTERNAL:
        return
    assert words[0] in ("python", "torchrun"), command
    if words[0] == "torchrun":
        if not any(word.endswith(".py") for word in words):
            return  # a flag of torchrun's own
        first = next(i for i, word in enumerate(words) if word.endswith(".py"))
        check(words[first:])
    elif len(words) > 1:
        check(words[2:] if words[1] == "-m" else words[1:])


@pytest.mark.slow
@pytest.mark.parametrize("script", ["latro.py", "eval.py", "-m benchmarks", "toy/make.py",
                                    "experiments/evidence.py", "experiments/peer.py",
                                    "experiments/real_model.py"])
def test_help(script):
    run = subprocess.run([sys.executable, *script.split(), "--help"], cwd=ROOT, text=True,
                         capture_output=True)
    assert run.returncode == 0 and "usage:" in run.stdout, run.stderr[-500:]


def test_the_loop_is_that_of_the_code():
    block = re.search(r"<!-- loop -->\n```python\n(.*?)```", PAGES[0].read_text(), re.DOTALL)[1]
    lines = [line.strip() for line in block.splitlines()]
    code = [line.strip() for line in (ROOT / "latro.py").read_text().splitlines()]
    starts = [i for i in range(len(code)) if code[i:i + len(lines)] == lines]
    assert len(lines) > 15 and len(starts) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http", "#")):
            assert (page.parent / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_table_of_what_was_not_run(page):
    for line in page.read_text().splitlines():
        assert not (line.startswith("|") and "not run |" in line), line


def test_readme_is_short():
    assert len(PAGES[0].read_text().splitlines()) <= 190


def test_every_page_is_in_the_index():
    index = Path(ROOT, "docs", "README.md").read_text()
    assert all(f"({page.name})" in index for page in PAGES[1:] if page.name != "README.md")
