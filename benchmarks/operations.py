"""What is timed: the operations of this package, their rivals, and the floor of each."""

import argparse, math, os, shutil
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

import latro
from harness.errors import UserError
from kernels import TRITON, reference

from .timing import OURS, Task, device, relative

MODELS = {  # width D, vocabulary V
    "Llama-3.1-8B": (4096, 128256), "Llama-3.2-1B": (2048, 128256), "Phi-3.5-mini": (3072, 32064),
    "Mistral-7B-v0.3": (4096, 32768), "Qwen2.5-0.5B": (896, 151936), "SmolLM2-135M": (576, 49152),
    "toy": (64, 512)}
RATIONALES = (48, 16, 500), (3, 16, 500), (8, 16, 48)  # questions, K, L
ROWS = 16, 256, 768  # of a decoding step
NO_CUDA, OLD_TORCH = "not run: no CUDA device", "not in this torch"
LOGIT_BYTES = {"plain": 12, "compile": 4, "linear_cross_entropy": 6}  # of [T, V], at the very least
TILES = {  # T, V, D, warps: stages
    (128, 256, 64, 8): (3, 4), (256, 128, 64, 8): (3, 4), (128, 128, 64, 4): (3, 4, 5),
    (128, 128, 64, 8): (3, 4, 5), (64, 256, 64, 4): (3, 4), (128, 256, 32, 8): (6,),
    (128, 256, 128, 8): (2,), (128, 128, 128, 8): (3,)}


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return (hidden @ weight.T).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def uncompilable() -> str | None:
    """Why torch.compile would fail here."""
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    return None if found else "not run: no C++ compiler"


def compiled(fn: Callable) -> Callable | str:
    return uncompilable() or torch.compile(fn, dynamic=False)


def on_gpu(module: str, name: str) -> Callable | str:
    """A function that runs on CUDA only, from a module that may not be installed."""
    if not find_spec(module.split(".")[0]) or module.startswith("kernels.") and not TRITON:
        return "not installed"
    return getattr(import_module(module), name) if device() == "cuda" else NO_CUDA


def negated(nll: Callable | str, **options) -> Callable | str:
    return nll if isinstance(nll, str) else lambda *x: -nll(*x, reduction="none", **options).float()


def logprob_candidates() -> dict[str, Callable | str]:
    """(hidden, weight, targets) -> (T,) float32, or why there is no such function here."""
    liger = on_gpu("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
    cce = on_gpu("cut_cross_entropy", "linear_cross_entropy")
    nll = getattr(F, "linear_cross_entropy", OLD_TORCH)
    chunks = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    chunked = negated(nll, options=chunks()) if chunks else OLD_TORCH
    return {OURS: on_gpu("kernels.token_logprob", "token_logprobs"),
            "reference": reference.token_logprobs.__wrapped__, "plain": plain,
            "compile": compiled(plain),
            "linear_cross_entropy": negated(nll), "linear_cross_entropy_chunked": chunked,
            "liger": negated(liger), "cce": negated(cce),
            "cce_unfiltered": negated(cce, filter_eps=None)}


def logprob_inputs(T: int, D: int, V: int) -> tuple[Tensor, ...]:
    """hidden (T, D) ~ N(0, 1), weight (V, D) ~ N(0, 1/D), targets and upstream (T,); bfloat16, on a
    CPU float32. Every other row is moved along its target's direction until that has p of about
    0.98: where a model is sure, rounding shows in the gradients."""
    torch.manual_seed(0)
    H, W, upstream = (torch.randn(n, device=device()) for n in ((T, D), (V, D), (T,)))
    targets = torch.randint(V, (T,), device=device())
    toward = W.div_(D**0.5)[targets[::2]]
    H[::2] += (math.log(V) + 4.5) * toward / toward.square().sum(1, keepdim=True)
    dtype = torch.bfloat16 if device() == "cuda" else torch.float32
    return H.to(dtype), W.to(dtype), targets, upstream


def logprob_task(model: str, T: int, frozen: str | None, candidates: dict) -> Task:
    """Tolerance: CCE's filter and sums in bfloat16 pass, a wrong sign or missing term does not."""
    D, V = MODELS[model]
    H, W, targets, upstream = logprob_inputs(T, D, V)
    H.requires_grad_(frozen != "hidden"), W.requires_grad_(frozen != "weight")
    wide, tolerance = (torch.float32, 0.1) if device() == "cuda" else (torch.float64, 1e-3)
    leaves = [x for x in (H, W) if x.requires_grad]

    def forward(fn: Callable) -> tuple[Tensor]:
        with torch.no_grad():
            return fn(H.detach(), W.detach(), targets),

    def backward(logp: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(logp, leaves, upstream.to(logp.dtype))

    def full(fn: Callable, to: torch.dtype = H.dtype) -> tuple[Tensor, ...]:
        operands = [x.detach().to(to).requires_grad_(x.requires_grad) for x in (H, W)]
        logp = fn(*operands, targets)
        return logp.detach(), *backward(logp, *(x for x in operands if x.requires_grad))

    truth = full(reference.token_logprobs.__wrapped__, wide)
    names = ["logp", *(n for n, x in (("dH", H), ("dW", W)) if x.requires_grad)]
    free = (torch.cuda.mem_get_info()[1] - torch.cuda.memory_allocated() if device() == "cuda"
            else math.inf)
    unfit = {name: f"does not fit: {n * T * V / 1e9:.0f} GB for [T, V], {free / 1e9:.0f} GB free"
             for name, n in LOGIT_BYTES.items() if name in candidates and n * T * V > free}
    return Task(
        dict(model=model, T=T, D=D, V=V, frozen=frozen), candidates | unfit, tolerance,
        lambda fn: dict(zip(names, map(relative, full(fn), truth))),
        lambda fn: dict(forward=lambda: partial(forward, fn),
                        backward=lambda: partial(backward, fn(H, W, targets), *leaves),
                        full=lambda: partial(full, fn)),
        products(H, W, free), calls=1)


def products(H: Tensor, W: Tensor, free: float) -> dict[str, Callable]:
    """The matrix products that the passes contain: H W^T; again, with those of dH and dW; all.
    Over chunks of the vocabulary where [T, V] takes more than half of the free bytes."""
    T, V, needed = len(H), len(W), (H.requires_grad, W.requires_grad)
    H, W = H.detach(), W.detach()
    width = min(V, max(1, int(min(free, 2**40)) // (512 * T * H.element_size())) * 256)
    room, dH, dW = H.new_empty(T * width), torch.empty_like(H), torch.empty_like(W)

    def run(*gradients: bool) -> tuple[Tensor, Tensor]:
        for backward, first in product(gradients, range(0, V, width)):
            w = W[first:first + width]
            z = torch.mm(H, w.T, out=room[:T * len(w)].view(T, len(w)))
            if backward and needed[0]:
                dH.addmm_(z, w, beta=float(first > 0))
            if backward and needed[1]:
                torch.mm(z.T, H, out=dW[first:first + width])
        return dH, dW
    return dict(forward=lambda: partial(run, False), backward=lambda: partial(run, True),
                full=lambda: partial(run, False, True))


def score_task(questions: int, K: int, L: int, bound: str) -> Task:
    """Ragged: z of 1 to L tokens, y of 1 to 8."""
    torch.manual_seed(0)
    lengths = torch.stack([torch.randint(1, n + 1, (questions * K,)) for n in (L, 8)], 1).flatten()
    at = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(device())
    logp, noise = torch.randn(2, int(at[-1]), device=device())
    inputs = logp, logp + 0.1 * noise, at[:-1:2], at[1::2], at[2::2], K, 0.05
    moved, room = torch.randn(2, 3 * len(logp) // 2, device=device())
    wide = (x.double() if x is logp or x is inputs[1] else x for x in inputs)
    definition = latro.score_rationales.__wrapped__
    truth = definition(*wide, bound=bound)
    return Task(
        dict(questions=questions, K=K, L=L, bound=bound, bytes=12 * len(logp)),
        {OURS: on_gpu("kernels.rationale_score", "score_rationales"),
         "reference": definition, "compile": compiled(definition)},
        1e-3, lambda fn: dict(zip(truth._fields, map(relative, fn(*inputs, bound=bound), truth))),
        lambda fn: dict(call=lambda: partial(fn, *inputs, bound=bound)),
        dict(call=lambda: partial(room.copy_, moved)))


def sample_task(rows: int, V: int) -> Task:
    """Error: by how many standard deviations the draws' log-probs miss their expectation."""
    torch.manual_seed(0)
    logits, uniform = 3 * torch.randn(rows, V, device=device()), torch.rand(rows, device=device())
    logp = logits.double().log_softmax(-1)
    mean = (logp.exp() * logp).sum(-1, keepdim=True)
    deviation = (logp.exp() * (logp - mean)**2).sum().sqrt()

    def inverse(x: Tensor) -> Tensor:
        return reference.inverse_cdf_sample(x, uniform, 1.0)
    return Task(
        dict(rows=rows, V=V, bytes=logits.nbytes),
        {"inverse": inverse, "compile": compiled(inverse),
         "multinomial": lambda x: x.softmax(-1).multinomial(1)[:, 0],
         "gumbel": lambda x: (x.softmax(-1) / torch.empty_like(x).exponential_()).argmax(-1)}, 5.0,
        lambda fn: {"draws (sigma)": float(
            (logp.gather(1, fn(logits)[:, None]) - mean).sum().abs() / deviation)},
        lambda fn: dict(call=lambda: lambda: (fn(logits),)),
        dict(call=lambda: partial(logits.amax, -1)))


Tasks = Iterator[Callable[[], Task]]


def logprob(args: argparse.Namespace) -> Tasks:
    """Log-probs, and gradients for an arbitrary upstream. forward is without, full with gradients;
    floor: 1 matrix product, 3 (backward) and 4 (full). extra GB: peak of each pass beyond operands
    and results (log-probs, dH, dW). error: max |x - wide| / max |wide|."""
    for model, T in product(args.models, args.tokens):
        yield partial(logprob_task, model, T, args.frozen, logprob_candidates())


def score(args: argparse.Namespace) -> Tasks:
    """Log-probs of packed rationales to rewards, advantages and token weights. floor: a copy of the
    12 bytes a token that have to move. error: max |x - wide| / max |wide|."""
    for shape, bound in product(RATIONALES, ("elbo", "iwae")):
        yield partial(score_task, *shape, bound)


def sample(args: argparse.Namespace) -> Tasks:
    """A token for each row of float32 logits, its log-prob not included. floor: reading them once.
    There is no fused kernel for this: the table shows whether one would pay."""
    for V, rows in product({MODELS[model][1]: 0 for model in args.models}, ROWS):
        yield partial(sample_task, rows, V)


def tune(args: argparse.Namespace) -> Tasks:
    """logprob of our kernel, by tile (rows x columns x depth; loads by TMA or pointers) and by size
    of the buffer for dZ. ours: as it is."""
    if device() == "cpu":
        raise UserError("tune: needs a CUDA device; --help lists what runs without one")
    from kernels import token_logprob as ours
    held = dict(tile_for=ours.tile_for, DZ_BYTES=ours.DZ_BYTES)

    def having(**settings) -> Callable:
        def fn(*operands: Tensor) -> Tensor:  # its backward pass comes before anyone else's forward
            vars(ours).update(held | settings)
            return ours.token_logprobs(*operands)
        return fn

    candidates = {OURS: having()}
    candidates |= {f"dZ of 2^{n} bytes": having(DZ_BYTES=2**n) for n in range(26, 30)}
    loads = (True, False) if torch.cuda.get_device_capability()[0] in (9, 10) else (False,)
    for (size, all_stages), tma in product(TILES.items(), loads):
        for tile in (ours.Tile(*size, stages, tma) for stages in all_stages):
            name = "{0}x{1}x{2}, {3} warps, {4} stages".format(*tile) + ", TMA" * tma
            candidates[name] = having(tile_for=lambda *_, tile=tile: tile)
    for model, T in product(args.models, args.tokens):
        yield partial(logprob_task, model, T, args.frozen, candidates)
    vars(ours).update(held)
