"""Proves what every kernel costs, compiled for GPUs that are not there: see aot.py.

Also on another Triton, where TRITON_ASIDE names its folder:
    pip install --no-deps --target DIR triton==3.6.0
"""

import json
import os
import subprocess
import sys

import pytest

import kernels
from conftest import ROOT

TRITONS = {"": None, ", aside": os.environ.get("TRITON_ASIDE")}  # folder on the path, if any
SHARED = {80: 166_912, 90: 232_448}  # bytes a block can have; the compiler does not check
STACK = {80: 64, 90: 0}  # bytes: sm_80 has no TMA, and spills a few of its pointers
BUILDS = [f"sm_{arch}{which}" for which in TRITONS for arch in SHARED]

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(not kernels.TRITON, reason="there is no Triton here")]


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """One a build, all at once: a process can be set up for one target only."""
    started = {}
    for build in BUILDS:
        arch, folder = build[3:5], TRITONS[build[5:]]
        if folder or build == f"sm_{arch}":
            path = dict(TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("cache")))
            path |= dict(PYTHONPATH=folder) if folder else {}
            started[build] = subprocess.Popen(
                [sys.executable, ROOT / "tests" / "kernels" / "aot.py", arch], env=os.environ | path,
                text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    yield started
    for process in started.values():
        process.kill()


@pytest.fixture(scope="module", params=BUILDS)
def build(request, processes):
    """Target, and what each kernel costs there."""
    if request.param not in processes:
        pytest.skip("TRITON_ASIDE names no other Triton")
    process = processes[request.param]
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-2000:]
    return int(request.param[3:5]), [json.loads(line) for line in out.splitlines()]


def of(costs, *names, **labels):
    found = [c for c in costs if c["kernel"] in names and all(c[k] == v for k, v in labels.items())]
    assert found
    return found


def test_all_is_compiled(build):
    arch, costs = build
    assert len(of(costs, "forward_tile")) == len(of(costs, "backward_tile")) == 4
    assert len(of(costs, "score_question")) == 12


def test_it_can_be_launched(build):
    """Shared memory and registers of a block are there to be had."""
    arch, costs = build
    for c in costs:
        assert c["shared"] <= SHARED[arch], c
        assert c["registers"] * 32 * c["warps"] <= 65_536, c


def test_nothing_of_double_precision_and_no_atomics(build):
    for c in build[1]:
        assert c["f64"] == c["atomics"] == 0, c


def test_tensor_cores(build):
    """wgmma and TMA on sm_90, mma and asynchronous copies on sm_80."""
    arch, costs = build
    product, load = ("HGMMA", "UTMALDG") if arch == 90 else ("HMMA", "LDGSTS")
    for dtype in ("bfloat16", "float16"):
        for c in of(costs, "forward_tile", "backward_tile", dtype=dtype):
            assert c[product], c
        for c in of(costs, "forward_tile", "backward_tile", dtype=dtype, D=64):
            assert c[load], c


def test_float32_is_not_rounded_to_tf32(build):
    for c in of(build[1], "forward_tile", "backward_tile", dtype="float32"):
        assert c["HGMMA"] == c["HMMA"] == 0, c


def test_registers_are_not_spilled(build):
    """Hundreds of rationales a question spill, and are rare; no more than sm_80 otherwise."""
    arch, costs = build
    for c in of(costs, "forward_tile", "backward_tile"):
        assert c["stack"] <= STACK[arch], c
    for c in of(costs, "score_question"):
        assert c["stack"] == 0 or c["K"] > 100, c
