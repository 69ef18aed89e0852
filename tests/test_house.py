"""Proves that imports run one way, that rank and world size are named in one file, and that
functions and lines are short."""

import ast
import re
import sys
from pathlib import Path

import pytest

from conftest import ROOT

# Rooms from the bottom up: a room may import those before it, and itself.
ROOMS = "kernels", "harness", "latro", "eval", "benchmarks", "experiments"
OUTSIDE = {"kernels": {"torch", "triton", "transformers"}}
FILES = {room: sorted((ROOT / room).rglob("*.py")) or [ROOT / f"{room}.py"] for room in ROOMS}
METHOD = [ROOT / name for name in ("latro.py", "eval.py")]


def imports(path: Path) -> set[str]:
    """The top-level packages that a file imports, relative imports as its own room."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parts[0] if node.level else node.module
            found.add(package.split(".")[0].removesuffix(".py"))
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room):
    allowed = {*ROOMS[:ROOMS.index(room) + 1]}
    for path in FILES[room]:
        assert imports(path) & {*ROOMS} <= allowed, path


def test_kernels_need_nothing_else():
    standard = set(sys.stdlib_module_names)
    for path in FILES["kernels"]:
        assert imports(path) - standard <= OUTSIDE["kernels"] | {"kernels"}, path


def test_rank_and_world_size_are_named_in_one_file():
    pattern = re.compile(r"\b(?:get_rank|get_world_size|world_size|RANK|WORLD_SIZE|LOCAL_RANK)\b")
    for path in {p for files in FILES.values() for p in files}:
        named = pattern.search(path.read_text())
        assert path == ROOT / "harness" / "distributed.py" or not named, (path, named)


def test_the_method_begins_on_the_first_pages():
    """Section 2 of latro.py, sampling, starts before line 130."""
    lines = (ROOT / "latro.py").read_text().splitlines()
    assert next(i for i, line in enumerate(lines, 1) if "- 2. " in line) < 130


@pytest.mark.parametrize("path", METHOD + FILES["kernels"] + FILES["harness"], ids=str)
def test_every_function_fits_a_screen(path):
    """60 lines; the training loop, which is Algorithm 1 as a whole, 75."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= (75 if node.name == "train" else 60), (node.name, length)


def test_lines_are_short():
    """100 characters of code; 118 of prose, where tables and shown output may be longer."""
    folders = *ROOMS, "toy", "tests"
    sources = {path for folder in folders
               for path in [*(ROOT / folder).rglob("*.py"), *ROOT.glob(f"{folder}.py")]}
    long = [(path.name, i) for path in sources
            for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100]
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        prose = re.sub(r"```.*?```", lambda shown: "\n" * shown[0].count("\n"), page.read_text(),
                       flags=re.DOTALL)
        long += [(page.name, i) for i, line in enumerate(prose.splitlines(), 1)
                 if len(line) > 118 and not line.startswith("|")]
    assert not long
