"""Proves that every kernel compiles for each of six architectures within its resources, without a
GPU: see aot.py.

Also with other versions of Triton, if TRITON_ASIDE names their folders, separated as in PATH:
    pip install --no-deps --target DIR/triton-3.6.0 triton==3.6.0
"""

import json
import os
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest

import kernels
from conftest import ROOT, background

ASIDE = [folder for folder in os.environ.get("TRITON_ASIDE", "").split(os.pathsep)
         if folder and not folder.endswith(f"triton-{version('triton')}")]  # that one is tested
TENSOR_CORES = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
TMA = 90, 100
MAX_SHARED = {  # bytes per block, which the compiler does not check
    80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(not kernels.TRITON, reason="not installed: triton")]


def sizes(arch, folder):
    """The K that are compiled: more for a GPU with the least shared memory, one with the most."""
    return (2, 100) if folder or arch not in (86, 90) else (2, 16, 100, 512)


def compile_all(arch, folder, fused, cache):
    """The resources of each kernel. fused: whether Triton may fuse a product and a sum, which is
    the default of 3.9 and not that of 3.10."""
    options = dict(TRITON_CACHE_DIR=str(cache), TRITON_DEFAULT_FP_FUSION=str(int(fused)))
    script = ROOT / "tests" / "kernels" / "aot.py"
    process = subprocess.run(
        [sys.executable, script, str(arch), *map(str, sizes(arch, folder))], text=True, timeout=600,
        capture_output=True, env=os.environ | options | (dict(PYTHONPATH=folder) if folder else {}))
    assert process.returncode == 0, process.stderr[-2000:]
    return [json.loads(line) for line in process.stdout.splitlines()]


BUILDS = {
    f"sm_{arch}{f', {Path(folder).name}' if folder else ''}{'' if fused else ', unfused'}":
    (arch, folder, fused)
    for folder in (None, *ASIDE) for arch in MAX_SHARED for fused in (True, False)
    if fused or arch == 90}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One process per build, since a process can have one target only."""
    with background(compile_all, {name: (*build, tmp_path_factory.mktemp("cache"))
                                  for name, build in BUILDS.items()}) as futures:
        yield futures


@pytest.fixture(scope="module", params=BUILDS)
def build(request, results):
    """The target, and the resources of each kernel there."""
    return BUILDS[request.param][0], results[request.param].result()


def select(compiled, *kernels, **labels):
    """The compiled kernels with these names and labels; there must be some."""
    found = [c for c in compiled
             if c["kernel"] in kernels and all(c[k] == v for k, v in labels.items())]
    assert found
    return found


@pytest.mark.parametrize("name", BUILDS)
def test_every_launch_is_compiled(name, results):
    arch, folder, _ = BUILDS[name]
    compiled = results[name].result()
    assert len(select(compiled, "forward_tile")) == len(select(compiled, "backward_tile")) == 4
    scores = Counter(c["K"] for c in select(compiled, "score_question"))
    assert scores == dict.fromkeys(sizes(arch, folder), 5)


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
    """wgmma on sm_90 and tcgen05 on sm_100, both with TMA; elsewhere mma and asynchronous
    copies."""
    arch, compiled = build
    load = "UTMALDG" if arch in TMA else "LDGSTS"
    for dtype in ("bfloat16", "float16"):
        for c in select(compiled, "forward_tile", "backward_tile", dtype=dtype, D=64):
            assert c[TENSOR_CORES[arch]] and c[load], c
        for c in select(compiled, "forward_tile", "backward_tile", dtype=dtype):
            assert c["HMMA"] or c["HGMMA"] or c["UTCHMMA"], c


def test_a_logit_takes_one_fused_multiply_add(build):
    """Whether or not Triton fuses by itself: each thread has 128 logits."""
    arch, compiled = build
    if arch == 90:
        for c in select(compiled, "forward_tile", "backward_tile", dtype="bfloat16", D=64):
            assert c["FFMA"] >= 128, c


def test_float32_is_not_rounded_to_tf32(build):
    _, compiled = build
    for c in select(compiled, "forward_tile", "backward_tile", dtype="float32"):
        assert c["UTCHMMA"] == c["HGMMA"] == c["HMMA"] == 0, c


def test_registers_are_not_spilled(build):
    """Except by hundreds of rationales per question, which are rare."""
    _, compiled = build
    for c in select(compiled, "forward_tile", "backward_tile"):
        assert c["stack"] == 0, c
    for c in select(compiled, "score_question"):
        assert c["stack"] == 0 or c["K"] > 100, c
