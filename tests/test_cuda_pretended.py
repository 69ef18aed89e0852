"""Proves, without a GPU, that every line that only a GPU reaches can run: each statement that asks
for CUDA is executed, on fake CUDA tensors or under a pretended CUDA, or the reason why not is
below."""

import json
import os
import shutil
from collections import defaultdict
from concurrent.futures import wait
from pathlib import Path

import pytest

import cuda_lines
from conftest import CUDA, ROOT, background, begin

PRETENDED = "tests/pretended_cuda.py -m pytest -q -m gpu --show-capture=no"
AGAIN = "plan or resume or reuse or alike or wait or captured"  # these reach no other lines
RUNS = {  # arguments of python, and whether the lines that they reach are recorded; longest first
    "benchmarks": (True, [*PRETENDED.split(), "tests/benchmarks"]),
    "lines of the gpu tests": (True, [*PRETENDED.split(), "tests/test_gpu.py",
                                      "-k", f"not ({AGAIN})"]),
    "other gpu tests": (False, [*PRETENDED.split(), "tests/test_gpu.py", "-k", AGAIN]),
    "fake tensors": (True, ["tests/fake_cuda.py"]),
    "errors": (True, [*"-m pytest -q tests/kernels tests/harness/test_memory.py -k".split(),
                      "opcheck or float64_uses or a_capture or gpu_can_hold or numbers_of_rat"
                      " or auto_uses_torch"])}
UNREACHED = {  # statements, and why these runs do not reach them
    'kernels/__init__.py: raise error("--kernels triton needs Triton and a CUDA device; auto takes'
    ' what runs here")':
        "an error without CUDA: test_triton_without_a_gpu_is_refused",
    'kernels/token_logprob.py: asm: tl.constexpr = "ex2.approx.ftz.f32 $0, $1;"':
        "PTX, which Triton's interpreter cannot run: tests/kernels/test_compile.py compiles it",
    'kernels/token_logprob.py: y = tl.inline_asm_elementwise(asm, "=f,f", [x], tl.float32,'
    ' is_pure=True, pack=1)':
        "the same",
    'benchmarks/operations.py: return f"cannot be imported: {short_error(e)}"':
        "a broken package: test_a_rival_that_is_missing_says_why",
    'benchmarks/operations.py: return -nll.apply(*operands).float()':
        "needs Liger and a GPU; on a CPU, test_a_rival_is_called_as_it_expects calls it",
    'benchmarks/operations.py: return "not run: for Hopper only"':
        "the pretended GPU is a Hopper, and Liger is not installed"}


def run(name: str, reached: Path) -> tuple[int, str]:
    """Exit code, and the end of what was printed."""
    is_recorded, arguments = RUNS[name]
    folder = {"REACHED_LINES": str(reached)} if is_recorded else {}
    process = begin(*arguments, cwd=ROOT, env=os.environ | folder)
    printed, errors = process.communicate(timeout=1800)
    return process.returncode, printed[-3000:] + errors[-1000:]


@pytest.fixture(scope="module")
def reached(tmp_path_factory):
    return tmp_path_factory.mktemp("reached")


@pytest.fixture(scope="module")
def runs(reached):
    with background(run, {name: (name, reached) for name in RUNS}) as futures:
        yield futures


needs_no_gpu = pytest.mark.skipif(
    CUDA(), reason="there is a GPU: pytest -m gpu runs the same on it")


@needs_no_gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_run(name, runs):
    """All its tests pass, and none is skipped."""
    if name == "fake tensors" and not shutil.which("g++"):
        pytest.skip("no C++ compiler")
    code, printed = runs[name].result()
    assert code == 0 and " passed" in printed and "skipped" not in printed, printed


@needs_no_gpu
@pytest.mark.slow
def test_every_line_that_asks_for_cuda_is_reached(runs, reached):
    """Prints those that are not, with the reason."""
    wait(runs.values())
    lines = defaultdict(set)
    for path in reached.glob("*.json"):
        for file, numbers in json.loads(path.read_text()).items():
            lines[file].update(numbers)
    texts = cuda_lines.sources()
    missing = {str(one): one for one in cuda_lines.unreached(lines, texts)}
    for text, one in missing.items():
        print(f"{one.file}:{one.lines[0]}: {UNREACHED.get(text, 'NOT REACHED')}")
    assert not missing.keys() - UNREACHED.keys()


def test_reasons_are_those_of_the_code():
    statements = cuda_lines.statements(cuda_lines.sources())
    asking = {str(one) for one in statements if one.place == "cuda"}
    assert UNREACHED.keys() <= asking


EXAMPLE = '''
import torch

def time_call(action):
    if device() == "cpu":
        return action()
    start = Event()
    if slow:
        start.record()
    return start

def Event():
    return torch.Event()

def used_by_both():
    return 1

def peak():
    """Of CUDA's memory."""
    if torch.cuda.is_available():
        used_by_both()
        return most_bytes()
    else:
        used_by_both()
    return 0  # without CUDA

def most_bytes():
    for part in parts():
        yield part
'''
ASKING = ["    start = Event()", "    if slow:", "        start.record()", "    return start",
          "def Event():", "    return torch.Event()", "    if torch.cuda.is_available():",
          "        used_by_both()", "        return most_bytes()", "def most_bytes():",
          "    for part in parts():", "        yield part"]


def test_statements_that_ask_for_cuda():
    texts = {"example.py": EXAMPLE}
    asking = [one for one in cuda_lines.statements(texts) if one.place == "cuda"]
    assert [one.text for one in asking] == ASKING
    reached = {"example.py": {one.lines[0] for one in asking[1:]}}
    assert [one.text for one in cuda_lines.unreached(reached, texts)] == ASKING[:1]
    triton = {"kernel.py": "import triton\nx = 1\n"}
    assert len(cuda_lines.unreached({}, triton)) == 2
