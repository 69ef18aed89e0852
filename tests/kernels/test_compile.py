"""Proves that every kernel compiles for sm_80 and sm_90 within their resources, without a GPU: see
aot.py.

Also with a second version of Triton, if TRITON_ASIDE names its folder:
    pip install --no-deps --target DIR triton==3.6.0
"""

import json
import os
import subprocess
import sys

import pytest

import kernels
from conftest import ROOT

TRITONS = {"": None, ", aside": os.environ.get("TRITON_ASIDE")}  # folder to put on the path, if any
MAX_SHARED = {80: 166_912, 90: 232_448}  # bytes per block; the compiler does not check
MAX_STACK = {80: 64, 90: 0}  # bytes; sm_80 has no TMA, and spills a few of its pointers
BUILDS = [f"sm_{arch}{version}" for version in TRITONS for arch in MAX_SHARED]

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(not kernels.TRITON, reason="not installed: triton")]


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """One process per build, since a process can have one target only. All start at once."""
    started = {}
    for build in BUILDS:
        arch, folder = build[3:5], TRITONS[build[5:]]
        if folder or build == f"sm_{arch}":
            paths = dict(TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("cache")))
            paths |= dict(PYTHONPATH=folder) if folder else {}
            started[build] = subprocess.Popen(
                [sys.executable, ROOT / "tests" / "kernels" / "aot.py", arch],
                env=os.environ | paths, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    yield started
    for process in started.values():
        process.kill()


@pytest.fixture(scope="module", params=BUILDS)
def build(request, processes):
    """The target, and the resources of each kernel there."""
    if request.param not in processes:
        pytest.skip("TRITON_ASIDE names no second Triton")
    process = processes[request.param]
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-2000:]
    return int(request.param[3:5]), [json.loads(line) for line in out.splitlines()]


def select(compiled, *kernels, **labels):
    """The compiled kernels with these names and labels; there must be some."""
    found = [c for c in compiled
             if c["kernel"] in kernels and all(c[k] == v for k, v in labels.items())]
    assert found
    return found


def test_every_launch_is_compiled(build):
    _, compiled = build
    assert len(select(compiled, "forward_tile")) == len(select(compiled, "backward_tile")) == 4
    assert len(select(compiled, "score_question")) == 12


def test_a_block_fits_into_shared_memory_and_registers(build):
    arch, compiled = build
    for c in compiled:
        assert c["shared"] <= MAX_SHARED[arch], c
        assert c["registers"] * 32 * c["warps"] <= 65_536, c


def test_no_double_precision_and_no_atomics(build):
    _, compiled = build
    for c in compiled:
        assert c["f64"] == c["atomics"] == 0, c


def test_tensor_cores(build):
    """wgmma and TMA on sm_90, mma and asynchronous copies on sm_80."""
    arch, compiled = build
    product, load = ("HGMMA", "UTMALDG") if arch == 90 else ("HMMA", "LDGSTS")
    for dtype in ("bfloat16", "float16"):
        for c in select(compiled, "forward_tile", "backward_tile", dtype=dtype):
            assert c[product], c
        for c in select(compiled, "forward_tile", "backward_tile", dtype=dtype, D=64):
            assert c[load], c


def test_float32_is_not_rounded_to_tf32(build):
    _, compiled = build
    for c in select(compiled, "forward_tile", "backward_tile", dtype="float32"):
        assert c["HGMMA"] == c["HMMA"] == 0, c


def test_registers_are_not_spilled(build):
    """Except by sm_80's pointers, and by hundreds of rationales per question, which are rare."""
    arch, compiled = build
    for c in select(compiled, "forward_tile", "backward_tile"):
        assert c["stack"] <= MAX_STACK[arch], c
    for c in select(compiled, "score_question"):
        assert c["stack"] == 0 or c["K"] > 100, c
