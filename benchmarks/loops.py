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

from .operations import Tasks, compiler_problem
from .rivals import Continuous, Generate, Released, Trl
from .timing import FLOOR, OURS, Task, device, measure, quartiles, relative_error
from .work import Loop, Ours, Workload


# ------------------------------------------------------------------------------ floor
class Floor(Loop):
    """What the hardware alone takes: a read of the bytes that decoding must read, then matrix
    products of as many FLOPs as one forward pass each of policy and reference, and a backward pass
    that costs two."""

    def run(self, use_uniform: bool) -> list:
        with self.phase("sample"):
            read_memory(self.work.bytes_to_decode())
        if self.work.optimizer is not None:
            for phase in ("score", "backward"):
                with self.phase(phase):
                    multiply_matrices(2 * self.work.forward_flops())
        return []


@cache
def square_matrix(n: int, place: str) -> Tensor:
    return torch.randn(n, n, device=place,
                       dtype=torch.bfloat16 if place == "cuda" else torch.float32)


def multiply_matrices(flops: float) -> None:
    """Matrix products of so many FLOPs in all, of a size that suits the hardware."""
    n = 8192 if device() == "cuda" else 512
    while 2 * n**3 > flops:
        n //= 2
    for _ in range(round(flops / (2 * n**3))):
        square_matrix(n, device()) @ square_matrix(n, device())


def read_memory(size: float) -> None:
    """Reads so many bytes, from a buffer larger than any cache."""
    n = 16384 if device() == "cuda" else 4096
    numbers = square_matrix(n, device()).view(torch.float32).flatten()
    whole, rest = divmod(int(size) // 4, len(numbers))
    for part in [numbers] * whole + [numbers[:rest]]:
        part.sum()


# ------------------------------------------------------------------------------ tasks
def loop_errors(exact: dict, loop: Loop) -> dict[str, float]:
    """Errors of a candidate, by what they are of.

    lengths: the number of rationales that differ in length from the forced one. tokens: the number
    that differ from those of `generate` when both draw by the same uniform numbers. gradient: its
    relative distance from our gradient."""
    work, check_tokens = loop.work, "tokens" in exact
    rows = loop(use_uniform=check_tokens)
    found = dict(lengths=float(sum(len(ids) != n
                                   for ids, n in zip(rows, work.lengths, strict=True))))
    if check_tokens:
        found["tokens"] = float(sum(a != b for a, b in zip(rows, exact["tokens"])))
    if hasattr(loop, "add_gradient") and "gradient" in exact:
        pairs = zip(loop.gradient_to_compare(), exact["gradient"])
        found["gradient"] = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    loop.runs.clear()
    return found


def report(loops: dict[str, Loop], name: str, times: dict[str, dict]) -> dict:
    """Median seconds by phase, and figures derived from them. A figure that cannot be measured here
    is absent."""
    medians = {of: {p: quartiles([run[p] for run in loops[of].runs])["median"]
                    for p in loops[of].runs[0]} for of in {name, FLOOR}}
    loop, own, floor = loops[name], medians[name], medians[FLOOR]
    work, [total] = loop.work, [t["median"] for t in times.values()]
    learning = own["score"] + own["backward"] if work.optimizer is not None else None
    if name == FLOOR:
        figures = {"GB/s": work.bytes_to_decode() / own["sample"] / 1e9}
        if learning is not None:
            figures["TFLOP/s"] = 4 * work.forward_flops() / learning / 1e12
        return dict(phases=own, figures=figures)
    figures = {"rationales/s": len(work.lengths) / total, "tokens/s": sum(work.lengths) / total}
    if learning is not None:
        figures["of decode limit"] = floor["sample"] / own["sample"]
        figures["MFU"] = (floor["score"] + floor["backward"]) / learning
        if device() == "cuda":
            figures["MFU of 989 TFLOP/s"] = 4 * work.forward_flops() / learning / H100_FLOPS
    if device() == "cuda":
        figures["peak GB"] = loop.peak / 1e9
    return dict(phases=own, figures=figures)


def loop_task(model: str, args: argparse.Namespace, train: bool) -> Task:
    """A rollout, or with `train` an update.

    The tolerance is wide on a GPU: in bfloat16 advantages are small differences of rounded sums. A
    wrong sign or a missing term does not pass."""
    work, on_cpu = Workload(model, args, train), device() == "cpu"
    name, ours, floor = "update" if train else "rollout", Ours(work), Floor(work)
    if train:
        rivals = dict(trl=Trl(work) if find_spec("trl") else "not installed")
    else:
        static, graphs = dict(cache_implementation="static"), transformers.CompileConfig()
        graphs._compile_all_devices = True  # not only on a GPU
        rivals = dict(
            generate=Generate(work), static=Generate(work, **static, disable_compile=True),
            compiled=compiler_problem() or Generate(work, **static, compile_config=graphs),
            continuous=Continuous(work))
    loops = {OURS: ours} | rivals | dict(released=Released(work))
    exact = {}
    if on_cpu:  # float32: the same numbers draw the same tokens
        exact["tokens"] = Generate(work).sample(use_uniform=True)
    if train:
        exact["gradient"] = ours.gradient_to_compare()
    floor()  # the first run makes its matrices
    floor.runs.clear()
    shape = dict(model=model, layers=work.shape.layers, questions=args.questions, K=args.K,
                 L=args.L, tokens=sum(work.lengths))
    return Task(shape, loops, 1e-4 if on_cpu else 0.3, partial(loop_errors, exact),
                lambda loop: {name: lambda: loop}, {name: lambda: floor}, calls=1,
                report=partial(report, loops | {FLOOR: floor}))


def decode_task(model: str, args: argparse.Namespace) -> Task:
    """One decoding step of questions x K rows that have L tokens each. Every call repeats the same
    step."""
    work, rows = Workload(model, args, train=False), args.questions * args.K
    prompts = np.random.default_rng(0).integers(work.eos, size=(rows, args.L)).tolist()
    uniform = torch.rand(rows, dtype=torch.float64, device=device())
    decoder = Decoder(work.policy, prompts, 1, 1)
    with torch.no_grad():
        logits = decoder.prefill()
    decoder.set_length(1)
    token, drawn = logits.argmax(-1), torch.empty_like(uniform, dtype=torch.long)

    @torch.no_grad()
    def step() -> tuple:
        logits.copy_(decoder.decode_step(token))
        drawn.copy_(inverse_cdf_sample(logits, uniform, 1.0))
        decoder.end -= 1
        return ()

    if decoder.pace.cuda_graphs:
        runner = CUDAGraphRunner(step)

        def replay() -> tuple:
            runner(())
            return ()
        candidates = {OURS: replay, "eager": step}
    else:
        candidates = {OURS: step, "eager": "the same: a CPU has no CUDA graphs"}

    def result(candidate: Callable) -> Tensor:
        for _ in range(3):  # a graph is captured in the second call, and replayed from then on
            candidate()
        return logits.clone()

    exact, itemsize = result(step), torch.finfo(work.dtype).bits // 8
    floor = partial(read_memory, itemsize * (
        work.weights_per_step() + rows * args.L * work.cache_numbers_per_token()))
    return Task(dict(model=model, layers=work.shape.layers, rows=rows, columns=args.L), candidates,
                1e-3, lambda candidate: dict(logits=relative_error(result(candidate), exact)),
                lambda candidate: dict(step=lambda: candidate), dict(step=lambda: floor))


# ------------------------------------------------------------------------------ processes
def measure_in_group(make: Callable[[], Task], only: list[str] | None,
                     rounds: int) -> tuple[dict, list]:
    """`measure` in a process group of this one process, as latro.train makes one."""
    distributed.init_distributed()
    try:
        return measure(make, only, rounds)
    finally:
        dist.destroy_process_group()


def measure_in_subprocess(*args) -> tuple[dict, list]:
    """`measure_in_group` in a new process, so that no model leaves memory to the next one."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(measure_in_group, *args).result()


# ------------------------------------------------------------------------------ commands
def decode(args: argparse.Namespace) -> Tasks:
    """A decoding step: draws one token for each of questions x K rows that have L tokens each.
    floor: a read of the weights, keys and values that the step must read. eager: our step launched
    operation by operation, without a CUDA graph. error: of the logits, relative to eager's."""
    for model in args.models:
        yield partial(decode_task, model, args)


def rollout(args: argparse.Namespace) -> Tasks:
    """K rationales for each question. generate, static, compiled: `generate` of transformers, with
    a growing cache, with a static cache, and with torch.compile. continuous: its `generate_batch`,
    which batches continuously. released: as the paper's code calls `generate`, every row decoding L
    tokens. floor: a read of the bytes that decoding must read. error: the number of rationales of a
    wrong length, and in float32 of those with other tokens than generate's."""
    for model in args.models:
        yield partial(loop_task, model, args, False)


def update(args: argparse.Namespace) -> Tasks:
    """Sampling, rewards, gradient and AdamW for some questions. released: the procedure of the
    paper's code. trl: RLOOTrainer with generate, whose reward is free. floor: a read of the bytes
    that decoding must read, then bare matrix products of as many FLOPs as two forward passes
    (policy and reference) and a backward pass need that compute nothing twice. MFU: these FLOPs per
    second of score and backward, as a fraction of the speed of the bare products. peak GB: includes
    the candidate's own models. error: as for rollout, and how far the gradient is from ours."""
    if args.K < 2:
        raise UserError(f"--K {args.K}: a leave-one-out baseline needs at least 2")
    for model in args.models:
        yield partial(loop_task, model, args, True)
