"""Times the fused operations beside their rivals: the README's GPU table comes from here.

    python -m kernels.bench logprob --models Llama-3.1-8B --tokens 16384 --plot
    python -m kernels.bench score|sample|tune

Every candidate is first held against a wider computation on the very inputs it is timed on; one
that is wrong is not timed, and the exit code is 1. Rounds go from candidate to candidate, so that
a drifting clock hits all alike. "floor" is what the hardware takes for the bare products, copy or
read of that shape, in the same rounds. DIR/NAME.json and .md are written after every shape.
Without CUDA a toy runs on the CPU, our kernels not at all: an interpreter's times mean nothing.
"""

import argparse, json, math, os, platform, shlex, shutil, subprocess, sys, time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from functools import cache, partial
from importlib import import_module, metadata
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import TRITON, reference

MODELS = {  # width D, vocabulary V
    "Llama-3.1-8B": (4096, 128256), "Llama-3.2-1B": (2048, 128256), "Phi-3.5-mini": (3072, 32064),
    "Mistral-7B-v0.3": (4096, 32768), "Qwen2.5-0.5B": (896, 151936), "SmolLM2-135M": (576, 49152),
    "toy": (64, 512)}
RATIONALES = (48, 16, 500), (3, 16, 500), (8, 16, 48)  # questions, K, L
ROWS = 16, 256, 768  # of a decoding step
OURS, FLOOR, WARM_UP = "triton", "floor", 2
NO_CUDA, OLD_TORCH = "not run: no CUDA device", "not in this torch"
LOGIT_BYTES = {"plain": 12, "compile": 4, "linear_cross_entropy": 6}  # of [T, V], at the very least
TILES = {  # T, V, D, warps: stages
    (128, 256, 64, 8): (3, 4), (256, 128, 64, 8): (3, 4), (128, 128, 64, 4): (3, 4, 5),
    (128, 128, 64, 8): (3, 4, 5), (64, 256, 64, 4): (3, 4), (128, 256, 32, 8): (6,),
    (128, 256, 128, 8): (2,), (128, 128, 128, 8): (3,)}

class Problem(Exception):
    """One sentence for the user: what is wrong, and the way out."""

class Task(NamedTuple):
    """What is to be computed, and by whom. A pass maps its name to a function that prepares it and
    returns what is timed, `calls` times in a row where one takes microseconds."""

    shape: dict[str, object]
    candidates: dict[str, Callable | str]  # by name; a str says why there is none
    tolerance: float
    errors: Callable  # candidate -> by name of the result
    passes: Callable  # candidate -> by name of the pass
    floor: dict[str, Callable]
    calls: int = 10

def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"

@cache
def scratch() -> Tensor:
    return torch.empty(2**28, dtype=torch.uint8, device="cuda")

def seconds(prepare: Callable, calls: int) -> float:
    """Of one call, from a cold L2 cache: while that is being emptied the host gets ahead with its
    launches, as it does in training."""
    action = prepare()
    if device() == "cpu":
        first = time.perf_counter()
        for _ in range(calls):
            action()
        return (time.perf_counter() - first) / calls
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    scratch().zero_()
    first.record()
    for _ in range(calls):
        action()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / calls

def extra_bytes(prepare: Callable) -> int:
    """The peak of a call, beyond what was allocated before and what it returns."""
    action = prepare()
    action()  # workspaces are there from now on
    action = prepare()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    returned = action()
    peak = torch.cuda.max_memory_allocated()
    return peak - before - sum(x.nbytes for x in returned if x is not None)

def quartiles(samples: list[float]) -> dict[str, float]:
    at = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    values = torch.tensor(samples, dtype=torch.float64).quantile(at)
    return dict(zip(("q1", "median", "q3"), values.tolist()))

def relative(x: Tensor, truth: Tensor) -> float:
    """max |x - truth| / max |truth|."""
    return float((x.to(truth.dtype) - truth).abs().max() / truth.abs().max())

def attempt(row: dict, action: Callable, *args):
    """Too little memory, of the GPU or of one multiprocessor, is a result: a note in the row."""
    short = import_module("triton.runtime.errors").OutOfResources if TRITON else MemoryError
    try:
        return action(*args)
    except (torch.OutOfMemoryError, short) as e:
        row["note"] = str(e).split(". ")[0]  # advice follows

def check(task: Task, fn: Callable, row: dict) -> None:
    """Errors and memory of a candidate, or a note that it computes something else."""
    errors = task.errors(fn)
    row["error"] = {k: e if math.isfinite(e) else None for k, e in errors.items()}
    if wrong := [f"{k} is off by {e:.2g}" for k, e in errors.items() if not e <= task.tolerance]:
        row["note"] = "wrong: " + ", ".join(wrong)
    elif device() == "cuda":
        row["peak_bytes"] = {p: extra_bytes(prepare) for p, prepare in task.passes(fn).items()}

def measure(make: Callable[[], Task], only: list[str] | None, rounds: int) -> tuple[dict, list]:
    """The shape, and a row for the floor and for each candidate: the timed ones first, by time."""
    task = make()
    torch.compiler.reset()  # it gives up on a function that has seen many shapes
    if unknown := [name for name in only or () if name not in task.candidates]:
        raise Problem(f"--only {unknown[0]}: choose from {', '.join(task.candidates)}")
    rows = {FLOOR: dict(candidate=FLOOR, note=None)}
    jobs = {FLOOR: task.floor}
    for name in only or task.candidates:
        fn = task.candidates[name]
        rows[name] = row = dict(candidate=name, note=fn if isinstance(fn, str) else None)
        if callable(fn):
            attempt(row, check, task, fn, row)
            jobs[name] = task.passes(fn)
    samples = {(name, p): [] for name in jobs for p in task.floor}
    for _, (name, p) in product(range(WARM_UP + rounds), samples):
        if rows[name]["note"] is None:
            samples[name, p].append(attempt(rows[name], seconds, jobs[name][p], task.calls))
    times = {name: {p: quartiles(samples[name, p][WARM_UP:]) for p in task.floor}
             for name in jobs if rows[name]["note"] is None}
    return task.shape, compared(rows, times)

def compared(rows: dict[str, dict], times: dict[str, dict]) -> list[dict]:
    """Rows with times, the fraction of the floor that they reach, and the ratio to ours; sorted."""
    median = {name: {p: t["median"] for p, t in own.items()} for name, own in times.items()}
    ours, floor = median.get(OURS, {}), median[FLOOR]
    for name, own in median.items():
        rows[name] |= dict(seconds=times[name], fraction={p: floor[p] / own[p] for p in own},
                           ratio={p: own[p] / ours[p] for p in ours})
    last = {name: [*own.values()][-1] for name, own in median.items()} | {FLOOR: 0.0}
    return sorted(rows.values(), key=lambda row: last.get(row["candidate"], math.inf))

def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return (hidden @ weight.T).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]

def compiled(fn: Callable) -> Callable | str:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    return torch.compile(fn, dynamic=False) if compiler else "not run: no C++ compiler"

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
            "reference": reference.token_logprobs, "plain": plain, "compile": compiled(plain),
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
        return logp.detach(), *torch.autograd.grad(logp, leaves, upstream.to(logp.dtype))

    def full(fn: Callable, to: torch.dtype = H.dtype) -> tuple[Tensor, ...]:
        operands = [x.detach().to(to).requires_grad_(x.requires_grad) for x in (H, W)]
        return backward(fn(*operands, targets), *(x for x in operands if x.requires_grad))

    truth = full(reference.token_logprobs, wide)
    names = ["logp", *(n for n, x in (("dH", H), ("dW", W)) if x.requires_grad)]
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] if device() == "cuda" else math.inf
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
    (T, D), V, needed = H.shape, len(W), (H.requires_grad, W.requires_grad)
    H, W = H.detach(), W.detach()
    width = min(V, max(1, int(min(free, 2**40)) // (512 * T * H.element_size())) * 256)
    room, dH, dW = H.new_empty(T * width), torch.empty_like(H), torch.empty_like(W)

    def run(*gradients: bool) -> None:
        for backward, first in product(gradients, range(0, V, width)):
            w = W[first:first + width]
            z = torch.mm(H, w.T, out=room[:T * len(w)].view(T, len(w)))
            if backward and needed[0]:
                dH.addmm_(z, w, beta=float(first > 0))
            if backward and needed[1]:
                torch.mm(z.T, H, out=dW[first:first + width])
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
    truth = reference.score_rationales(*wide, bound=bound)
    return Task(
        dict(questions=questions, K=K, L=L, bound=bound, bytes=12 * len(logp)),
        {OURS: on_gpu("kernels.rationale_score", "score_rationales"),
         "reference": reference.score_rationales, "compile": compiled(reference.score_rationales)},
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
        return reference.pick_tokens(x, uniform, 1.0)
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
    of the buffer for dZ. triton: as it is set."""
    if device() == "cpu":
        raise Problem("tune: needs a CUDA device; --help lists what runs without one")
    from . import token_logprob as ours
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

COMMANDS = {  # what makes the tasks, and its options beside those that all have
    "logprob": (logprob, ("models", "tokens", "frozen", "plot")), "score": (score, ()),
    "sample": (sample, ("models",)), "tune": (tune, ("models", "tokens", "frozen"))}

class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise Problem(message)

def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)

def parse(argv: list[str]) -> argparse.Namespace:
    every = [model for model in MODELS if model != "toy"] if device() == "cuda" else ["toy"]
    tokens = [4096, 16384, 32768] if device() == "cuda" else [256]
    models = dict(nargs="+", choices=MODELS, metavar="NAME", help=f"{', '.join(MODELS)}")
    options = dict(
        tokens=dict(nargs="+", type=count, metavar="T", help="rows of H"),
        frozen=dict(choices=("weight", "hidden"), help="what wants no gradient"),
        plot=dict(action="store_true", help="draw the full pass to DIR/logprob.png"),
        only=dict(nargs="+", metavar="NAME", help="of the candidates"),
        rounds=dict(type=count, default=15, metavar="N", help="(default: 15)"),
        out=dict(type=Path, default=Path("bench"), metavar="DIR", help="(default: bench)"))
    kind = dict(formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = Parser(prog="python -m kernels.bench", description=__doc__, **kind)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, (tasks, flags) in COMMANDS.items():
        about = " ".join(tasks.__doc__.split())
        command = commands.add_parser(name, description=about, help=about.split(". ")[0])
        for flag in (*flags, "only", "rounds", "out"):
            command.add_argument(f"--{flag}", **(options | dict(models=models))[flag])
        command.set_defaults(models=every, tokens=tokens)
    commands.choices["tune"].set_defaults(models=["Llama-3.1-8B", "SmolLM2-135M"], tokens=[16384])
    return parser.parse_args(argv)

def environment(argv: list[str]) -> dict:
    """What a number needs to be worth something."""
    git = "git describe --always --dirty --abbrev=40 --exclude=*".split()
    packages = "torch", "triton", "liger_kernel", "cut_cross_entropy"
    done = shutil.which("git") and subprocess.run(git, cwd=Path(__file__).parent, text=True,
                                                  capture_output=True)
    return dict(
        command=shlex.join(["python", "-m", "kernels.bench", *argv]),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=done.stdout.strip() or None if done else None,
        device=torch.cuda.get_device_name() if device() == "cuda" else
        f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        **{package: metadata.version(package) if find_spec(package) else None
           for package in packages})

def table(shape: dict, rows: list[dict]) -> str:
    """Markdown: a line for each candidate, passes side by side, without columns that are empty."""
    def joined(row: dict, key: str, form: str, unit: float = 1) -> str:
        values = row.get(key, {}).values()
        return " / ".join("-" if v is None else f"{v / unit:{form}}" for v in values)

    passes = list(rows[0]["seconds"])
    results = next((row["error"] for row in rows if "error" in row), {})
    heads = ["candidate", *(f"{p}, ms" for p in passes), "of floor", f"x {OURS}", "extra GB",
             f"error: {' / '.join(results)}"]
    lines = []
    for row in rows:
        times = [[f"{1e3 * t[k]:.4g}" for k in ("median", "q1", "q3")]
                 for t in row.get("seconds", {}).values()]
        lines.append([row["candidate"], *("{0} ({1} to {2})".format(*t) for t in times),
                      *([row["note"]] + [""] * len(passes))[:0 if times else len(passes)],
                      joined(row, "fraction", ".2f"), joined(row, "ratio", ".2f"),
                      joined(row, "peak_bytes", ".2f", 1e9), joined(row, "error", ".1e")])
    columns = [(head, "---", *column) for head, *column in zip(heads, *lines) if any(column)]
    title = ", ".join(f"{k} {v}" for k, v in shape.items() if v is not None)
    return "\n".join([f"**{title}**", "", *(f"| {' | '.join(x)} |" for x in zip(*columns)), "", ""])

def draw(rows: list[dict], png: Path) -> None:
    """Time and memory of the full pass by model, the smallest vocabulary first; one line for each
    candidate, one column of panels for each T."""
    plt = import_module("matplotlib.pyplot")
    plt.switch_backend("Agg")
    rows = [row for row in rows if "seconds" in row]
    models = sorted({(row["V"], row["D"], row["model"]) for row in rows})
    tokens, names = (list(dict.fromkeys(row[k] for row in rows)) for k in ("T", "candidate"))
    units = {"ms": lambda row: 1e3 * row["seconds"]["full"]["median"],
             "extra GB": lambda row: row.get("peak_bytes", {}).get("full", math.nan) / 1e9}
    figure, axes = plt.subplots(2, len(tokens), squeeze=False, layout="constrained",
                                sharex=True, figsize=(3 + 4 * len(tokens), 7))
    for (unit, T), axis in zip(product(units, tokens), axes.flat):
        for name in names:
            own = {row["model"]: units[unit](row) for row in rows
                   if (row["T"], row["candidate"]) == (T, name)}
            axis.plot([own.get(model, math.nan) for *_, model in models], label=name, marker=".",
                      color=f"C{names.index(name)}", linestyle=":" if name == FLOOR else "-")
        axis.set(yscale="log", title=f"T = {T}", ylabel=unit)
        axis.set_xticks(range(len(models)), [f"{m}\nV {V}, D {D}" for V, D, m in models], rotation=60)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, -1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(png, dpi=150, facecolor="white")
    plt.close(figure)

def run(args: argparse.Namespace, argv: list[str]) -> list[dict]:
    """Measures, prints and writes: after every task, for a run may be cut off."""
    tasks, rows, about = COMMANDS[args.command][0], [], environment(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise Problem(f"--out {args.out}: {e.strerror}; name a directory to write to") from None
    text = " ".join(tasks.__doc__.split()) + f"\n\n{', '.join(f'{k} {v}' for k, v in about.items())}\n\n"
    for make in tasks(args):
        shape, some = measure(make, args.only, args.rounds)
        print(table(shape, some) if rows else text + table(shape, some), flush=True)
        rows, text = rows + [shape | row for row in some], text + table(shape, some)
        (args.out / f"{args.command}.json").write_text(json.dumps(about | dict(rows=rows), indent=1))
        (args.out / f"{args.command}.md").write_text(text)
    return rows

def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 1 after a line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = parse(argv)
        rows = run(args, argv)
        if getattr(args, "plot", False):
            draw(rows, args.out / "logprob.png")
        if wrong := [row for row in rows if str(row["note"]).startswith("wrong")]:
            raise Problem(f"{wrong[0]['candidate']} is {wrong[0]['note']}; see {args.out}")
        return 0
    except Problem as e:
        why = e
    except torch.OutOfMemoryError:
        why = "not even the inputs fit into GPU memory: choose smaller --models, or fewer --tokens"
    print(f"kernels.bench: {why}", file=sys.stderr)
    return 1

if __name__ == "__main__":
    sys.exit(main())
