"""Compiles every kernel ahead of time, without a GPU, exactly as its wrapper would launch it.

    python tests/kernels/aot.py 90 2 100  one JSON line per kernel: its resources on sm_90, that of
                                          rationales with K = 2 and with K = 100

A stub of the driver names the target, and a launch only compiles. ptxas and cuobjdump, which come
with Triton, give the resources. Values are tested elsewhere, in the interpreter.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from kernels import rationale_score, token_logprob

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class StubDriver:
    """The parts of a driver that compiling needs."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(compiled) -> dict:
    """Resources of a compiled kernel: registers per thread, bytes of stack and shared memory, and
    how often the instructions that matter occur."""
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()

        def dump(flag: str) -> str:
            return subprocess.run([CUOBJDUMP, flag, f.name], capture_output=True, text=True,
                                  check=True).stdout
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)",
                                              dump("-res-usage")).groups())
        # To disassemble takes a second. Only kernels with matrix products have what is counted.
        sass = dump("-sass") if "mma" in ptx else ""
    count = {name: len(re.findall(rf"\b{name}\b", sass)) for name in
             ("UTCHMMA", "HGMMA", "HMMA", "UTMALDG", "UTMASTG", "LDGSTS", "FFMA")}
    return dict(registers=registers, stack=stack, shared=compiled.metadata.shared,
                f64=ptx.count(".f64"), atomics=len(re.findall(r"\b(?:atom|red)\.", ptx)), **count)


def launches(sizes: list[int]):
    """Pairs of a label and a function that calls a wrapper: every way to launch each kernel.
    sizes: numbers K of rationales."""
    for dtype, D, V in ((torch.bfloat16, 64, 1008), (torch.float16, 64, 1008),
                        (torch.bfloat16, 63, 1001), (torch.float32, 64, 1008)):
        h, W = (torch.zeros(n, D, dtype=dtype, requires_grad=True) for n in (300, V))
        targets = torch.zeros(300, dtype=torch.long)
        yield (dict(dtype=str(dtype).removeprefix("torch."), D=D),
               lambda: token_logprob.token_logprobs(h, W, targets, 0.7).sum().backward())
    for K in sizes:
        start, logp, penalty = torch.arange(0, 3 * K, 3), torch.zeros(3 * K), torch.zeros(K)
        for options in (dict(logp0=logp, penalty=penalty), dict(logp0=logp, bound="iwae"),
                        dict(logp0=None, penalty=0.5, reward="prob"),
                        dict(logp0=logp, reward="mean-prob"),
                        dict(logp0=logp, reward="correct", right=penalty > 0)):
            yield (dict(K=K, given=", ".join(options)),
                   lambda: rationale_score.score_rationales(
                       logp, z_start=start, y_start=start + 1, end=start + 3, K=K, beta=0.05,
                       **options))


def main(arch: int, *sizes: int) -> None:
    driver.set_active(StubDriver(arch))
    run, label = JITFunction.run, {}

    def compile_only(kernel, *args, warmup, **options):
        compiled = run(kernel, *args, warmup=True, **options)
        print(json.dumps(dict(kernel=kernel.__name__, **label, triton=triton.__version__,
                              warps=options.get("num_warps", 4), **resources(compiled))))
        return compiled
    JITFunction.run = compile_only
    for label, call in launches(sizes):
        call()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
