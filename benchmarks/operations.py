"""Operations that are timed: those of this package, their rivals, and the floor of each."""

import argparse
import math
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

import latro
from harness.errors import UserError, short_error
from kernels import TRITON, reference

from .timing import FLOOR, OURS, Task, device, relative_error

MODELS = {  # width D, vocabulary V
    "Llama-3.1-8B": (4096, 128256), "Llama-3.2-1B": (2048, 128256), "Phi-3.5-mini": (3072, 32064),
    "Mistral-7B-v0.3": (4096, 32768), "Qwen2.5-0.5B": (896, 151936), "SmolLM2-135M": (576, 49152),
    "toy": (64, 512)}
RATIONALES = (48, 16, 500), (3, 16, 500), (8, 16, 48)  # questions, K, L
ROWS = 16, 256, 768  # of a decoding step
NO_CUDA, OLD_TORCH = "not run: no CUDA device", "not in this torch"
LOGIT_BYTES = {"plain": 12, "compile": 4, "linear_cross_entropy": 6, "quack": 2}  # at least
GEMMS = {  # matrix products of T x D x V in a full pass with both gradients
    FLOOR: 4, OURS: 4, "reference": 4, "plain": 3, "compile": 3, "linear_cross_entropy": 3,
    "linear_cross_entropy_chunked": 4, "liger": 3, "liger_cute": 4, "liger_cutile": 4, "quack": 3,
    "trl": 4, "cce": 4, "cce_unfiltered": 4}
TILES = {  # T, V, D, warps: stages
    (128, 256, 64, 8): (3, 4), (256, 128, 64, 8): (3, 4), (128, 128, 64, 4): (3, 4, 5),
    (128, 128, 64, 8): (3, 4, 5), (64, 256, 64, 4): (3, 4), (128, 256, 32, 8): (6,),
    (128, 256, 128, 8): (2,), (128, 128, 128, 8): (3,)}

Tasks = Iterator[Callable[[], Task]]  # each call makes the inputs of one task


# ------------------------------------------------------------------------------ candidates
def plain_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What one would write first: all logits at once, in the operands' dtype."""
    return (hidden @ weight.T).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def compiler_problem() -> str | None:
    """Why torch.compile would fail here, or None."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    return None if compiler else "not run: no C++ compiler"


def compiled(function: Callable) -> Callable | str:
    """The function under torch.compile, or why it cannot be compiled here."""
    return compiler_problem() or torch.compile(function, dynamic=False)


def is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it would be in
        return False


def find_function(module: str, name: str, *needs: str, cuda: bool = True) -> Callable | str:
    """A function from a module that may not be installed, or why it cannot run here. needs: what it
    imports besides. cuda: whether it runs on CUDA only."""
    if not is_installed(module.split(".")[0]) or module.startswith("kernels.") and not TRITON:
        return "not installed"
    if missing := [other for other in needs if not is_installed(other)]:
        return f"not installed: {missing[0]}"
    if cuda and device() == "cpu":
        return NO_CUDA
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as e:
        return f"cannot be imported: {short_error(e)}"


def adapted(function: Callable | str, call: Callable, **options) -> Callable | str:
    """A candidate that runs call(function, hidden, weight, targets), or why it cannot run here."""
    return function if isinstance(function, str) else partial(call, function, **options)


def negated(nll: Callable, *operands: Tensor, **options) -> Tensor:
    return -nll(*operands, reduction="none", **options).float()


def liger_scaled(nll: type, *operands: Tensor) -> Tensor:
    return -nll.apply(*operands).float()


def quack(nll: Callable, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Keeps all logits. QuACK's chunked function returns one number for the whole batch, so it
    cannot take a gradient for each token."""
    return -nll(hidden, weight, None, targets, reduction="none", inplace_backward=True).float()


def trl(function: type, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As TRL's trainers call it, 32768 columns at a time, but without an entropy."""
    return function.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, ())[0]


def liger_cute() -> type | str:
    """Liger's kernel in CuTe. Elsewhere than on Hopper, Liger replaces it with chunked torch."""
    module = "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90"
    found = find_function(module, "LigerFusedScaledCrossEntropySM90Function", "cutlass")
    if not isinstance(found, str) and torch.cuda.get_device_capability() != (9, 0):
        return "not run: for Hopper only"
    return found


def logprob_candidates() -> dict[str, Callable | str]:
    """(hidden, weight, targets) -> (T,) float32, or why it cannot run here."""
    liger = find_function("liger_kernel.transformers.functional",
                          "liger_fused_linear_cross_entropy")
    cutile = find_function("liger_kernel.ops.cutile.ops.fused_linear_scaled_cross_entropy",
                           "LigerFusedLinearScaledCrossEntropyFunction", "cuda.tile")
    cce = find_function("cut_cross_entropy", "linear_cross_entropy")
    torch_nll = getattr(F, "linear_cross_entropy", OLD_TORCH)
    chunks = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    chunked = adapted(torch_nll, negated, options=chunks()) if chunks else OLD_TORCH
    return {OURS: find_function("kernels.token_logprob", "token_logprobs"),
            "reference": reference.token_logprobs.__wrapped__, "plain": plain_logprobs,
            "compile": compiled(plain_logprobs),
            "linear_cross_entropy": adapted(torch_nll, negated),
            "linear_cross_entropy_chunked": chunked,
            "liger": adapted(liger, negated), "liger_cute": adapted(liger_cute(), liger_scaled),
            "liger_cutile": adapted(cutile, liger_scaled),
            "quack": adapted(find_function("quack.linear_cross_entropy",
                                           "linear_cross_entropy_func", "cutlass"), quack),
            "trl": adapted(find_function("trl.kernels.chunked_logprob", "ChunkedLogProbFunction",
                                         "accelerate", cuda=False), trl),
            "cce": adapted(cce, negated),
            "cce_unfiltered": adapted(cce, negated, filter_eps=None)}


# ------------------------------------------------------------------------------ log-probs
def logprob_inputs(T: int, D: int, V: int) -> tuple[Tensor, ...]:
    """hidden (T, D) ~ N(0, 1), weight (V, D) ~ N(0, 1/D), targets (T,) and upstream gradient (T,).
    bfloat16; float32 on a CPU.

    Every other row is moved along the weight of its target until that token's probability is about
    0.98. Where a model is sure, rounding errors show in the gradients."""
    torch.manual_seed(0)
    H, W, upstream = (torch.randn(n, device=device()) for n in ((T, D), (V, D), (T,)))
    targets = torch.randint(V, (T,), device=device())
    direction = W.div_(D**0.5)[targets[::2]]
    H[::2] += (math.log(V) + 4.5) * direction / direction.square().sum(1, keepdim=True)
    dtype = torch.bfloat16 if device() == "cuda" else torch.float32
    return H.to(dtype), W.to(dtype), targets, upstream


def logprob_task(model: str, T: int, frozen: str | None, candidates: dict) -> Task:
    """Log-probs with their gradients. The tolerance lets CCE's filter and sums in bfloat16 pass,
    but no wrong sign and no missing term."""
    D, V = MODELS[model]
    H, W, targets, upstream = logprob_inputs(T, D, V)
    H.requires_grad_(frozen != "hidden")
    W.requires_grad_(frozen != "weight")
    wide, tolerance = (torch.float32, 0.1) if device() == "cuda" else (torch.float64, 1e-3)
    leaves = [x for x in (H, W) if x.requires_grad]

    def forward(candidate: Callable) -> tuple[Tensor]:
        with torch.no_grad():
            return (candidate(H.detach(), W.detach(), targets),)

    def backward(logp: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(logp, leaves, upstream.to(logp.dtype))

    def full(candidate: Callable, dtype: torch.dtype = H.dtype) -> tuple[Tensor, ...]:
        operands = [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in (H, W)]
        logp = candidate(*operands, targets)
        return logp.detach(), *backward(logp, *(x for x in operands if x.requires_grad))

    def errors(candidate: Callable) -> dict[str, float]:
        return dict(zip(names, map(relative_error, full(candidate), exact)))

    def passes(candidate: Callable) -> dict[str, Callable]:
        return dict(forward=lambda: partial(forward, candidate),
                    backward=lambda: partial(backward, candidate(H, W, targets), *leaves),
                    full=lambda: partial(full, candidate))

    exact = full(reference.token_logprobs.__wrapped__, wide)
    names = ["logp", *(name for name, x in (("dH", H), ("dW", W)) if x.requires_grad)]
    free = (torch.cuda.mem_get_info()[1] - torch.cuda.memory_allocated() if device() == "cuda"
            else math.inf)
    too_large = {
        name: f"does not fit: {size * T * V / 1e9:.0f} GB for [T, V], {free / 1e9:.0f} GB free"
        for name, size in LOGIT_BYTES.items() if name in candidates and size * T * V > free}
    return Task(dict(model=model, T=T, D=D, V=V, frozen=frozen), candidates | too_large, tolerance,
                errors, passes, matrix_products(H, W, free), calls=1,
                gemms={} if frozen else GEMMS)


def matrix_products(H: Tensor, W: Tensor, free: float) -> dict[str, Callable]:
    """The matrix products in each pass. forward: H W^T. backward: the same again, and those of dH
    and dW. full: all of these. They go over chunks of the vocabulary if [T, V] would take more than
    half of the free bytes."""
    T, V, needs_grad = len(H), len(W), (H.requires_grad, W.requires_grad)
    H, W = H.detach(), W.detach()
    width = min(V, max(1, int(min(free, 2**40)) // (512 * T * H.element_size())) * 256)
    buffer, dH, dW = H.new_empty(T * width), torch.empty_like(H), torch.empty_like(W)

    def run(*with_gradients: bool) -> tuple[Tensor, Tensor]:
        for backward, first in product(with_gradients, range(0, V, width)):
            w = W[first:first + width]
            z = torch.mm(H, w.T, out=buffer[:T * len(w)].view(T, len(w)))
            if backward and needs_grad[0]:
                dH.addmm_(z, w, beta=float(first > 0))
            if backward and needs_grad[1]:
                torch.mm(z.T, H, out=dW[first:first + width])
        return dH, dW
    return dict(forward=lambda: partial(run, False), backward=lambda: partial(run, True),
                full=lambda: partial(run, False, True))


# ------------------------------------------------------------------------------ scores, samples
def score_task(questions: int, K: int, L: int, bound: str) -> Task:
    """Scoring of rationales of different lengths: z has 1 to L tokens, y has 1 to 8."""
    torch.manual_seed(0)
    lengths = torch.stack([torch.randint(1, n + 1, (questions * K,)) for n in (L, 8)], 1).flatten()
    edges = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(device())
    spans = edges[:-1:2], edges[1::2], edges[2::2]
    logp, noise = torch.randn(2, int(edges[-1]), device=device())
    logp0 = logp + 0.1 * noise
    source, destination = torch.randn(2, 3 * len(logp) // 2, device=device())
    definition = latro.score_rationales.__wrapped__
    exact = definition(logp.double(), logp0.double(), *spans, K, 0.05, bound=bound)

    def call(candidate: Callable) -> tuple:
        return candidate(logp, logp0, *spans, K, 0.05, bound=bound)
    return Task(
        dict(questions=questions, K=K, L=L, bound=bound, bytes=12 * len(logp)),
        {OURS: find_function("kernels.rationale_score", "score_rationales"),
         "reference": definition, "compile": compiled(definition)}, 1e-3,
        lambda candidate: dict(zip(exact._fields, map(relative_error, call(candidate), exact))),
        lambda candidate: dict(call=lambda: partial(call, candidate)),
        dict(call=lambda: partial(destination.copy_, source)))


def sample_task(rows: int, V: int) -> Task:
    """Drawing one token per row. Error: by how many standard deviations the summed log-probs of the
    drawn tokens differ from their expectation."""
    torch.manual_seed(0)
    logits, uniform = 3 * torch.randn(rows, V, device=device()), torch.rand(rows, device=device())
    logp = logits.double().log_softmax(-1)
    mean = (logp.exp() * logp).sum(-1, keepdim=True)
    deviation = (logp.exp() * (logp - mean)**2).sum().sqrt()

    def inverse(x: Tensor) -> Tensor:
        return reference.inverse_cdf_sample(x, uniform, 1.0)

    def multinomial(x: Tensor) -> Tensor:
        return x.softmax(-1).multinomial(1)[:, 0]

    def gumbel(x: Tensor) -> Tensor:
        return (x.softmax(-1) / torch.empty_like(x).exponential_()).argmax(-1)

    def errors(candidate: Callable) -> dict[str, float]:
        difference = (logp.gather(1, candidate(logits)[:, None]) - mean).sum()
        return {"draws (sigma)": float(difference.abs() / deviation)}

    def call(candidate: Callable) -> tuple[Tensor]:
        return (candidate(logits),)
    return Task(
        dict(rows=rows, V=V, bytes=logits.nbytes),
        {"inverse": inverse, "compile": compiled(inverse), "multinomial": multinomial,
         "gumbel": gumbel}, 5.0, errors,
        lambda candidate: dict(call=lambda: partial(call, candidate)),
        dict(call=lambda: partial(logits.amax, -1)))


# ------------------------------------------------------------------------------ commands
def logprob(args: argparse.Namespace) -> Tasks:
    """Token log-probs, and their gradients for a given upstream gradient. forward: without
    gradients. backward: the gradients alone. full: both. floor: the matrix products in each pass,
    1, 3 and 4. GEMMs: how many of them a candidate computes in the full pass. extra GB: peak memory
    of each pass, beyond operands and results (log-probs, dH, dW). error: max |x - exact| / max
    |exact|."""
    for model, T in product(args.models, args.tokens):
        yield partial(logprob_task, model, T, args.frozen, logprob_candidates())


def score(args: argparse.Namespace) -> Tasks:
    """Rewards, advantages and token weights from the log-probs of packed rationales. floor: a copy
    of the 12 bytes per token that must be read or written. error: max |x - exact| / max |exact|."""
    for shape, bound in product(RATIONALES, ("elbo", "iwae")):
        yield partial(score_task, *shape, bound)


def sample(args: argparse.Namespace) -> Tasks:
    """A token for each row of float32 logits, without its log-prob. floor: a read of the logits.
    There is no fused kernel for this; the table shows whether one would pay."""
    for V, rows in product({MODELS[model][1]: 0 for model in args.models}, ROWS):
        yield partial(sample_task, rows, V)


def tune(args: argparse.Namespace) -> Tasks:
    """logprob with other settings of our kernel: the tile (rows x columns x depth, loaded by TMA or
    through pointers) and the size of the buffer for dZ. ours: the settings in use."""
    if device() == "cpu":
        raise UserError("tune: needs a CUDA device; --help lists what runs without one")
    from kernels import token_logprob as kernel
    defaults = dict(tile_for=kernel.tile_for, DZ_BYTES=kernel.DZ_BYTES)

    def with_settings(**changed) -> Callable:
        def logprobs(*operands: Tensor) -> Tensor:
            # They stay set for the backward pass, which runs before the next candidate's forward.
            vars(kernel).update(defaults | changed)
            return kernel.token_logprobs(*operands)
        return logprobs

    def with_tile(tile) -> Callable:
        return with_settings(tile_for=lambda hidden, weight: tile)

    candidates = {OURS: with_settings()}
    candidates |= {f"dZ of 2^{n} bytes": with_settings(DZ_BYTES=2**n) for n in range(26, 30)}
    has_tma = torch.cuda.get_device_capability()[0] in (9, 10)
    for (size, all_stages), tma in product(TILES.items(), (True, False) if has_tma else (False,)):
        for stages in all_stages:
            name = "{0}x{1}x{2}, {3} warps, {4} stages".format(*size, stages)
            candidates[f"{name}, TMA" if tma else name] = with_tile(
                kernel.Tile(*size, stages, tma))
    try:
        for model, T in product(args.models, args.tokens):
            yield partial(logprob_task, model, T, args.frozen, candidates)
    finally:
        vars(kernel).update(defaults)
