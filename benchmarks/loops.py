"""Whole loops that are timed: a decoding step, K rationales per question, an update."""

import argparse
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from importlib.util import find_spec
from multiprocessing import get_context

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import Tensor

from harness import distributed
from harness.errors import UserError
from harness.memory import H100_FLOPS
from kernels.decode import CUDAGraphRunner, Decoder
from kernels.reference import inverse_cdf_sample

from .operations import Tasks, uncompilable
from .rivals import Generate, Released, Trl
from .timing import FLOOR, OURS, Task, device, measure, quartiles, relative
from .work import Loop, Ours, Work


class Floor(Loop):
    """What the hardware takes for the bytes of `Work.bytes` and the products of `Work.flops`: one
    forward pass each of policy and reference, a backward pass that costs two."""

    def run(self, driven: bool) -> list:
        with self.phase("sample"):
            read(self.work.bytes())
        for phase in ("score", "backward") if self.work.optimizer else ():
            with self.phase(phase):
                multiply(2 * self.work.flops())
        return []


@cache
def operand(n: int, place: str) -> Tensor:
    return torch.randn(n, n, device=place,
                       dtype=torch.bfloat16 if place == "cuda" else torch.float32)


def multiply(flops: float) -> None:
    """Matrix products of so many FLOPs, as large as the hardware likes them."""
    n = 8192 if device() == "cuda" else 512
    while 2 * n**3 > flops:
        n //= 2
    for _ in range(round(flops / (2 * n**3))):
        operand(n, device()) @ operand(n, device())


def read(size: float) -> None:
    """Reads so many bytes, from more memory than caches hold."""
    n = 16384 if device() == "cuda" else 4096
    numbers = operand(n, device()).view(torch.float32).flatten()
    whole, rest = divmod(int(size) // 4, len(numbers))
    for part in [numbers] * whole + [numbers[:rest]]:
        part.sum()


def errors(truth: dict, loop: Loop) -> dict[str, float]:
    """By how much a candidate misses: rationales of another length than the forced one, or of other
    tokens than `generate`'s when both draw by the same numbers; its gradient, relative to ours."""
    work, exact = loop.work, "tokens" in truth
    drawn = loop(driven=exact)
    found = dict(lengths=float(sum(len(z) != n for z, n in zip(drawn, work.lengths, strict=True))))
    if exact:
        found["tokens"] = float(sum(a != b for a, b in zip(drawn, truth["tokens"])))
    if hasattr(loop, "learn") and "gradient" in truth:
        pairs = zip(loop.gradient(), truth["gradient"])
        found["gradient"] = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    loop.runs.clear()
    return found


def report(loops: dict[str, Loop], name: str, times: dict[str, dict]) -> dict:
    """Seconds by phase, and what they say; figures for which there is no measurement are absent."""
    median = {of: {p: quartiles([run[p] for run in loops[of].runs])["median"]
                   for p in loops[of].runs[0]} for of in {name, FLOOR}}
    loop, own, floor = loops[name], median[name], median[FLOOR]
    work, [total] = loop.work, [t["median"] for t in times.values()]
    figures = {"rationales/s": len(work.lengths) / total, "tokens/s": sum(work.lengths) / total}
    if work.optimizer:
        learning = own["score"] + own["backward"]
        figures["of decode limit"] = floor["sample"] / own["sample"]
        figures["MFU"] = (floor["score"] + floor["backward"]) / learning
        if device() == "cuda":
            figures["MFU of 989 TFLOP/s"] = 4 * work.flops() / learning / H100_FLOPS
    if name == FLOOR:
        figures = {"GB/s": work.bytes() / own["sample"] / 1e9}
        if work.optimizer:
            figures["TFLOP/s"] = 4 * work.flops() / learning / 1e12
    elif device() == "cuda":
        figures["peak GB"] = loop.peak / 1e9
    return dict(phases=own, figures=figures)


def loop_task(model: str, args: argparse.Namespace, train: bool) -> Task:
    """Tolerance: in bfloat16 advantages are small differences of rounded sums; a wrong sign or a
    missing term does not pass."""
    work, exact = Work(model, args, train), device() == "cpu"
    static, graphs = dict(cache_implementation="static"), transformers.CompileConfig()
    graphs._compile_all_devices = True  # not only on a GPU
    ours, floor, name = Ours(work), Floor(work), "update" if train else "rollout"
    rivals = dict(trl=Trl(work) if find_spec("trl") else "not installed") if train else dict(
        generate=Generate(work), static=Generate(work, **static, disable_compile=True),
        compiled=uncompilable() or Generate(work, **static, compile_config=graphs))
    loops = {OURS: ours} | rivals | dict(released=Released(work))
    truth = dict(tokens=Generate(work).draw(driven=True)) if exact else {}
    truth |= dict(gradient=ours.gradient()) if train else {}
    floor(), floor.runs.clear()  # the first run makes its operands
    shape = dict(model=model, layers=work.shape.layers, questions=args.questions, K=args.K,
                 L=args.L, tokens=sum(work.lengths))
    return Task(shape, loops, 1e-4 if exact else 0.3, partial(errors, truth),
                lambda loop: {name: lambda: loop}, {name: lambda: floor}, calls=1,
                report=partial(report, loops | {FLOOR: floor}))


def decode_task(model: str, args: argparse.Namespace) -> Task:
    """One step of questions x K rows with L tokens each before it, the same step every time."""
    work, rows = Work(model, args, train=False), args.questions * args.K
    prompts = np.random.default_rng(0).integers(work.eos, size=(rows, args.L)).tolist()
    chance = torch.rand(rows, dtype=torch.float64, device=device())
    decoder = Decoder(work.policy, prompts, 1, 1)
    with torch.no_grad():
        logits = decoder.prefill()
    decoder.set_length(1)
    token, drawn = logits.argmax(-1), torch.empty_like(chance, dtype=torch.long)

    @torch.no_grad()
    def step() -> tuple:
        logits.copy_(decoder.decode_step(token))
        drawn.copy_(inverse_cdf_sample(logits, chance, 1.0))
        decoder.end -= 1
        return ()
    recorded = CUDAGraphRunner(step) if decoder.pace.cuda_graphs else None

    def replay() -> tuple:
        recorded(())
        return ()
    steps = {OURS: replay if recorded else step,
             "eager": step if recorded else "the same: a CPU records nothing"}

    def result(run: Callable) -> Tensor:
        [run() for _ in range(3)]  # what is recorded runs as such from the second time on
        return logits.clone()
    truth, width = result(step), torch.finfo(work.dtype).bits // 8
    floor = partial(read, width * (work.weights() + rows * args.L * work.token()))
    return Task(dict(model=model, layers=work.shape.layers, rows=rows, columns=args.L), steps, 1e-3,
                lambda run: dict(logits=relative(result(run), truth)),
                lambda run: dict(step=lambda: run), dict(step=lambda: floor))


def tasks(args: argparse.Namespace, train: bool) -> Tasks:
    for model in args.models:
        yield partial(loop_task, model, args, train)


def decode(args: argparse.Namespace) -> Tasks:
    """A step of decoding: a token for each of questions x K rows that have L tokens before it,
    drawn too. floor: a read of the weights, keys and values that it must read. eager: what is ours,
    launched operation by operation. error: of the logits, relative to eager's."""
    for model in args.models:
        yield partial(decode_task, model, args)


def measured(make: Callable[[], Task], only: list[str] | None, rounds: int) -> tuple[dict, list]:
    """measure, in a group of this process alone, as latro.train makes one."""
    distributed.init_distributed()
    try:
        return measure(make, only, rounds)
    finally:
        dist.destroy_process_group()


def measured_apart(*args) -> tuple[dict, list]:
    """measured, in a process of its own: no model leaves memory to the next one."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(measured, *args).result()


def rollout(args: argparse.Namespace) -> Tasks:
    """K rationales for each question. generate, static, compiled: transformers' own, with a growing
    cache, a static one, and torch.compile; released: as the paper's code calls it, every row
    decoding L tokens. floor: a read of the bytes that decoding must read, the limit of its speed.
    error: rationales of a wrong length, and in float32 of other tokens than generate's."""
    return tasks(args, train=False)


def update(args: argparse.Namespace) -> Tasks:
    """Sampling, rewards, gradient and AdamW for some questions. released: as the paper's code goes
    about it; trl: RLOOTrainer with generate, whose reward is free. floor: a read of what decoding
    must read, then bare products of as many FLOPs as two forward passes (policy and reference) and
    a backward pass need that compute nothing twice. MFU: these FLOPs by the seconds of score and
    backward, of what the bare products reach. peak GB: a candidate's own models included."""
    if args.K < 2:
        raise UserError(f"--K {args.K}: a leave-one-out baseline needs at least 2")
    return tasks(args, train=True)
