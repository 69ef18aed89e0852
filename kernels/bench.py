"""Times the fused operations beside their rivals: the README's GPU table comes from here.

    python -m kernels.bench logprob --models Llama-3.1-8B --tokens 16384 --plot
    python -m kernels.bench score|sample|tune

Every candidate is first held against a wider computation on the very inputs it is timed on, and
one that is off is not timed. Rounds go from candidate to candidate, so that a drifting clock hits
all alike. "floor" is what the hardware does for the same shape in the same rounds: matrix products
without a softmax, a copy, a read. Writes DIR/NAME.json and DIR/NAME.md after every shape. Exit
code 1 where a candidate was wrong. Without CUDA a toy's shapes run on the CPU, and Triton does not.
"""

import argparse
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import TRITON, reference

MODELS = {  # width D, vocabulary V
    "Llama-3.1-8B": (4096, 128256), "Llama-3.2-1B": (2048, 128256),
    "Phi-3.5-mini": (3072, 32064), "Mistral-7B-v0.3": (4096, 32768),
    "Qwen2.5-0.5B": (896, 151936), "SmolLM2-135M": (576, 49152), "toy": (64, 512)}
OURS, FLOOR = "triton", "floor"
WARM_UP = 2  # rounds
CALLS = 10  # of what takes microseconds, to one measurement
NO_CUDA = "not run: no CUDA device"
LOGIT_BYTES = {"plain": 12, "compile": 4, "linear_cross_entropy": 6}  # [T, V] at its peak, at least
TILES = (  # T, V, D, warps, stages
    *((128, 256, 64, 8, s) for s in (3, 4)), *((256, 128, 64, 8, s) for s in (3, 4)),
    *((128, 128, 64, w, s) for w in (4, 8) for s in (3, 4, 5)),
    *((64, 256, 64, 4, s) for s in (3, 4)), *((128, 256, 32, 8, s) for s in (4, 6)),
    (128, 256, 128, 8, 2), *((128, 128, 128, 8, s) for s in (2, 3)))


class Problem(Exception):
    """One sentence for the user: what is wrong, and the way out."""


def on_cuda() -> bool:
    return torch.cuda.is_available()


def device() -> str:
    return "cuda" if on_cuda() else "cpu"


# ---------------------------------------------------------------------------------- measuring
def mark() -> float | torch.cuda.Event:
    """This moment: of the GPU's queue, or of the clock on the wall."""
    if not on_cuda():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(first: float | torch.cuda.Event, last: float | torch.cuda.Event) -> float:
    """Seconds."""
    if isinstance(first, float):
        return last - first
    last.synchronize()
    return first.elapsed_time(last) / 1e3


@cache
def scratch() -> Tensor:
    return torch.empty(2**28, dtype=torch.uint8, device="cuda")


def clear() -> None:
    """Empties the L2 cache; meanwhile the host gets ahead with its launches, as in training."""
    if on_cuda():
        scratch().zero_()


def calls(action: Callable[[], object]) -> dict[str, float]:
    """Seconds of one call out of CALLS in a row."""
    clear()
    first = mark()
    for _ in range(CALLS):
        action()
    return dict(call=between(first, mark()) / CALLS)


def extra_bytes(action: Callable[[], object]) -> int:
    """The peak of `action` over what was allocated before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    action()
    return torch.cuda.max_memory_allocated() - before


def free_bytes() -> int:
    """Of the GPU; without one, the machine's memory."""
    if not on_cuda():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def quartiles(samples: list[float]) -> dict[str, float]:
    """Of a sorted sample's straight-line interpolation."""
    at = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    return dict(zip(("q1", "median", "q3"),
                    torch.tensor(samples, dtype=torch.float64).quantile(at).tolist()))


def relative(x: Tensor, truth: Tensor) -> float:
    """max |x - truth| over max |truth|."""
    return float((x.to(truth.dtype) - truth).abs().max() / truth.abs().max())


@contextmanager
def shortage_noted(row: dict) -> Iterator[None]:
    """Too little memory, on the device or in a multiprocessor, is a result: a note in the row."""
    from triton.runtime.errors import OutOfResources
    try:
        yield
    except torch.OutOfMemoryError:
        row["note"] = "out of memory"
    except OutOfResources as e:
        row["note"] = f"does not fit: {e.name}, {e.required} needed, {e.limit} there"
    if row["note"] and on_cuda():
        torch.cuda.empty_cache()


def measure(task, rounds: int) -> list[dict]:
    """A row a candidate, the floor first. A task has `shape` and `tolerance`, `candidates` by name
    (functions, or why there is none), and methods: `errors` of a candidate by name of the result,
    `passes`: its seconds by name of the pass, `floor`: those of the floor, `memory`: peak bytes."""
    torch.compiler.reset()  # it gives up on a function that has seen many shapes
    rows = {FLOOR: dict(candidate=FLOOR, note=None)}
    for name, fn in task.candidates.items():
        rows[name] = row = dict(candidate=name, note=fn if isinstance(fn, str) else None)
        if not row["note"]:
            with shortage_noted(row):
                row |= inspect(task, fn)
    jobs = {FLOOR: task.floor} | {name: partial(task.passes, fn) for name, fn in
                                  task.candidates.items() if not rows[name]["note"]}
    samples = {name: [] for name in jobs}
    for _ in range(WARM_UP + rounds):
        for name, job in jobs.items():
            if not rows[name]["note"]:
                with shortage_noted(rows[name]):
                    samples[name].append(job())
    for name in jobs:
        if not rows[name]["note"]:
            rows[name]["seconds"] = {p: quartiles([s[p] for s in samples[name][WARM_UP:]])
                                     for p in samples[name][0]}
    return compared([*rows.values()])


def inspect(task, fn: Callable) -> dict:
    """Errors and memory of a candidate; a note where it computes something else."""
    errors = task.errors(fn)
    wrong = [f"{k} is off by {e:.2g}" for k, e in errors.items() if not e <= task.tolerance]
    row = dict(error={k: e if math.isfinite(e) else None for k, e in errors.items()})
    return row | (dict(note="wrong: " + ", ".join(wrong)) if wrong else task.memory(fn))


def compared(rows: list[dict]) -> list[dict]:
    """Fraction of the floor reached, time over that of our kernel; fastest first, notes last."""
    by_name = {row["candidate"]: row.get("seconds") for row in rows}
    for row in rows:
        for key, to in (("fraction", FLOOR), ("ratio", OURS)):
            if by_name.get(to) and "seconds" in row:
                own = {p: s["median"] / by_name[to][p]["median"] for p, s in row["seconds"].items()}
                row[key] = {p: 1 / x if key == "fraction" else x for p, x in own.items()}
    last = [*rows[0]["seconds"]][-1]
    return [rows[0], *sorted(rows[1:], key=lambda row: row["seconds"][last]["median"]
                             if "seconds" in row else math.inf)]


# ---------------------------------------------------------------------------------- logprob, tune
def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return (hidden @ weight.T).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def compiled(fn: Callable) -> Callable | str:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    return torch.compile(fn, dynamic=False) if compiler else "not run: no C++ compiler"


def triton_function(module: str, name: str) -> Callable | str:
    """Ours. Triton's interpreter would run it on a CPU, but its times mean nothing."""
    if not (TRITON and on_cuda()):
        return NO_CUDA
    return getattr(__import__(f"kernels.{module}", fromlist=[name]), name)


def of_torch(chunked: bool) -> Callable | str:
    """torch's own: "reference path" with all logits, or chunks of tokens."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return "not in this torch"
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    return lambda h, w, t: -F.linear_cross_entropy(h, w, t, reduction="none",
                                                   options=options).float()


def liger() -> Callable | str:
    if not find_spec("liger_kernel") or not on_cuda():
        return NO_CUDA if find_spec("liger_kernel") else "not installed"
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as nll
    return lambda h, w, t: -nll(h, w, t, reduction="none").float()


def cce(**options) -> Callable | str:
    if not find_spec("cut_cross_entropy") or not on_cuda():
        return NO_CUDA if find_spec("cut_cross_entropy") else "not installed"
    from cut_cross_entropy import linear_cross_entropy as nll
    return lambda h, w, t: -nll(h, w, t, reduction="none", **options).float()


def logprob_candidates() -> dict[str, Callable | str]:
    """(hidden, weight, targets) -> (T,) float32, or why there is no such function here."""
    return {
        OURS: triton_function("token_logprob", "token_logprobs"),
        "reference": reference.token_logprobs,
        "plain": plain,
        "compile": compiled(plain),
        "linear_cross_entropy": of_torch(chunked=False),
        "linear_cross_entropy_chunked": of_torch(chunked=True),
        "liger": liger(),
        "cce": cce(),
        "cce_unfiltered": cce(filter_eps=None)}


class Logprob:
    """log softmax(H W^T)[t], its gradients for an arbitrary upstream; bfloat16, on a CPU float32.

    H standard normal, W normal with variance 1 / D, so logits have variance 1; every other row is
    moved along its target's direction until the target has p of about 0.98."""

    def __init__(self, model: str, T: int, frozen: str | None, candidates: dict):
        D, V = MODELS[model]
        self.shape = dict(model=model, T=T, D=D, V=V, frozen=frozen)
        self.tolerance = 0.1 if on_cuda() else 1e-3  # a wrong sign or a missing term is 1
        random = partial(torch.randn, device=device(),
                         generator=torch.Generator(device()).manual_seed(0))
        H, W, self.upstream = random(T, D), random(V, D) / D**0.5, random(T)
        self.targets = torch.randint(V, (T,), device=device(), generator=random.keywords["generator"])
        toward = W[self.targets[::2]]
        H[::2] += (math.log(V) + 4.5) * toward / toward.square().sum(1, keepdim=True)
        dtype = torch.bfloat16 if on_cuda() else torch.float32
        self.H = H.to(dtype).requires_grad_(frozen != "hidden")
        self.W = W.to(dtype).requires_grad_(frozen != "weight")
        del H, W, toward
        wide = torch.float32 if on_cuda() else torch.float64
        self.truth = self.results(lambda h, w, t: reference.token_logprobs(h.to(wide), w.to(wide), t))
        self.candidates = candidates | {n: why for n, why in self.misfits() if callable(candidates.get(n))}

