"""Finds the lines of the project that only a GPU reaches, from its source.

A statement asks for CUDA if
- it mentions CUDA, or stands in a branch whose condition does, or after a branch for CPUs that ends
  in return or raise;
- its file imports Triton;
- it belongs to a function or class that only such statements use.
What stands in a branch for CPUs does not ask for CUDA.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = "harness", "kernels", "benchmarks"
CUDA, CPU = re.compile(r"cuda|nccl", re.IGNORECASE), re.compile(r"['\"]cpu['\"]|on_cpu")
LEAVES = ast.Return, ast.Raise, ast.Continue, ast.Break
DEFINITIONS = ast.FunctionDef, ast.ClassDef


def sources() -> dict[str, str]:
    """The text of each file whose lines count, by its name."""
    files = [ROOT / "latro.py", ROOT / "eval.py"]
    files += [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
    return {str(path.relative_to(ROOT)): path.read_text() for path in files}


def bodies(node: ast.stmt) -> Iterator[list[ast.stmt]]:
    """The blocks of statements in a statement: body, else, finally, handlers."""
    for name in ("body", "orelse", "finalbody"):
        if getattr(node, name, None):
            yield getattr(node, name)
    for part in (*getattr(node, "handlers", ()), *getattr(node, "cases", ())):
        yield part.body


def own_lines(node: ast.stmt) -> range:
    """The lines of a statement without those of the statements in it."""
    first = min((block[0].lineno for block in bodies(node)), default=node.end_lineno + 1)
    return range(node.lineno, max(first, node.lineno + 1))


class Statement:
    """A statement with its file, the names that it uses, and the definitions that it stands in.
    place: where it runs: on "cuda", on "cpu", or on "any" device."""

    def __init__(self, file: str, text: str, node: ast.stmt, place: str, inside: tuple[str, ...]):
        self.file, self.lines, self.inside = file, own_lines(node), inside
        self.text = "\n".join(text.splitlines()[line - 1] for line in self.lines)
        code = re.sub(r"#.*", "", self.text)
        self.place = "cuda" if place == "any" and CUDA.search(code) else place
        self.names = set(re.findall(r"\w+", code))
        self.defines = node.name if isinstance(node, DEFINITIONS) else None

    def __str__(self):
        return f"{self.file}: {self.text.strip().splitlines()[0]}"


def branches(node: ast.stmt, place: str) -> Iterator[tuple[list[ast.stmt], str]]:
    """The blocks of a statement, and where each runs."""
    condition = ast.unparse(node.test) if isinstance(node, ast.If) else ""
    other = dict(cuda="cpu", cpu="cuda", any="any")
    chosen = "cpu" if CPU.search(condition) else "cuda" if CUDA.search(condition) else "any"
    for block in bodies(node):
        own = other[chosen] if block is getattr(node, "orelse", None) else chosen
        yield block, own if place == "any" else place


def walk(file: str, text: str, block: list[ast.stmt], place: str,
         inside: tuple[str, ...] = ()) -> Iterator[Statement]:
    """The statements of a block and of those in it. Docstrings are no statements."""
    for node in block:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        yield Statement(file, text, node, place, inside)
        around = (*inside, node.name) if isinstance(node, DEFINITIONS) else inside
        for part, own in branches(node, place):
            yield from walk(file, text, part, own, around)
            if own == "cpu" and place == "any" and isinstance(part[-1], LEAVES):
                place = "cuda"


def only_for_cuda(found: list[Statement]) -> set[str]:
    """The functions and classes that statements which ask for CUDA use, and no others."""
    used = {place: set() for place in ("cuda", "cpu", "any")}
    for one in found:
        used[one.place] |= one.names - {one.defines, *one.inside}
    return {one.defines for one in found if one.defines and not one.defines.startswith("__")
            } & used["cuda"] - used["cpu"] - used["any"]


def statements(texts: dict[str, str]) -> list[Statement]:
    """Every statement of these files."""
    found = []
    for file, text in texts.items():
        is_triton = re.search(r"^import triton", text, re.MULTILINE)
        found += walk(file, text, ast.parse(text).body, "cuda" if is_triton else "any")
    while True:
        names = only_for_cuda(found)
        new = [one for one in found if one.place == "any" and names & {*one.inside, one.defines}]
        if not new:
            return found
        for one in new:
            one.place = "cuda"


def unreached(reached: dict[str, set[int]], texts: dict[str, str]) -> list[Statement]:
    """The statements that ask for CUDA and of which no line was reached."""
    return [one for one in statements(texts)
            if one.place == "cuda" and not reached.get(one.file, set()) & set(one.lines)]
