"""The Triton kernels in Triton's interpreter: every value and gradient against float64.

The interpreter runs the program of a tile in numpy: it shows what a kernel computes, not whether it
compiles nor what it costs. Tolerances are those of float32, stated where they are used; and nowhere
may a kernel be further from float64 than plain torch in the same dtype.
"""

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from packaging.version import parse
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from conftest import TINY, launch, rows, start, untimed

import kernels
import latro
import test_latro_estimator as test_estimator
from test_distributed import assert_close
from test_latro_estimator import BATCH, error, in_one_piece, one_by_one

triton = pytest.importorskip("triton")
from kernels import rationale_score, reference, token_logprob
from kernels.token_logprob import POINTERS, SMALL, TMA, Tile, token_logprobs

if not token_logprob.INTERPRETED.value:
    pytest.skip("compiled here: run CUDA_VISIBLE_DEVICES= python -m pytest tests to interpret them",
                allow_module_level=True)
if parse(triton.__version__) < parse("3.7.1") and parse(np.__version__) >= parse("2.4"):
    pytest.skip("to interpret loops of a length known only at run time needs triton 3.7.1"
                " or numpy < 2.4", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of inf - inf and 1 / 0
TILES = dict(pointers=POINTERS, small=SMALL, tma=TMA)
TINY_TILE = Tile(16, 16, 16, 4, 2)  # many programs for little work
DTYPES = torch.bfloat16, torch.float16, torch.float32
U32 = 2.0**-24  # of float32: the relative error of one rounding


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(kernels, "backend", "auto")


@pytest.fixture
def launched(monkeypatch):
    """A function that sets how the kernels are launched."""
    return lambda tile: monkeypatch.setattr(token_logprob, "tile_for", lambda *_: tile)


# ------------------------------------------------------- 1. token_logprobs: against float64

def problem(T, V, D, dtype=torch.float32, seed=0, spread=2.5):
    """H, W, targets, upstream: logits of deviation `spread`, some rows ignored, some upstream 0."""
    rng = torch.Generator().manual_seed(seed)
    h, W = torch.randn(T, D, generator=rng), torch.randn(V, D, generator=rng) * spread / D**0.5
    targets, g = torch.randint(V, (T,), generator=rng), torch.randn(T, generator=rng)
    targets[3::4] = -100
    g[1::5] = 0.0
    return h.to(dtype), W.to(dtype), targets, g


def run(f, h, W, targets, g, temperature=1.0):
    """Values, dH and dW of f."""
    h, W = h.detach().requires_grad_(), W.detach().requires_grad_()
    logp = f(h, W, targets, temperature)
    logp.backward(g.to(logp.dtype))
    return logp.detach(), h.grad, W.grad


def exact(h, W, targets, g, temperature=1.0):
    if not len(h):
        return h[:, 0].double(), h.double(), 0 * W.double()
    return run(in_one_piece, h.double(), W.double(), targets, g, temperature)


def plain(h, W, targets, temperature=1.0):
    """What one would write: logits in the operands' dtype, and all of them."""
    temperature = torch.as_tensor(temperature).view(-1, 1)
    logp = (F.linear(h, W).float() / temperature).log_softmax(-1)
    return logp.gather(-1, targets.clamp(min=0)[:, None])[:, 0].masked_fill(targets == -100, 0.0)


def largest(x):
    return float(x.abs().max()) if x.numel() else 0.0


def off(found, wanted):
    return largest(found.double() - wanted)


def check(h, W, targets, g, temperature=1.0):
    """Values, dH, dW of the kernels are no further from float64 than torch's own in that dtype.

    Further by 4 roundings of the largest logit, in float32, is allowed: both sum D products, torch
    in an order of its own. A gradient is rounded to its dtype twice (dZ, then the product): where
    few numbers are in it torch may be luckier, by half a rounding each time."""
    wanted = exact(h, W, targets, g, temperature)
    found = run(token_logprobs, h, W, targets, g, temperature)
    theirs = run(plain, h, W, targets, g, temperature)
    definition = run(reference.token_logprobs.__wrapped__, h, W, targets, g, temperature)[0]
    temperature = torch.as_tensor(temperature, dtype=torch.float64).view(-1, 1)
    z = largest(h.double() @ W.double().T / temperature)
    assert found[0].dtype == torch.float32 and (found[0][targets == -100] == 0).all()
    assert off(found[0], wanted[0]) <= min(off(theirs[0], wanted[0]),
                                           off(definition, wanted[0])) + 4 * U32 * max(z, 1)
    for ours, torchs, right, x in zip(found[1:], theirs[1:], wanted[1:], (h, W)):
        assert ours.shape == x.shape and ours.dtype == x.dtype
        slack = (4 * U32 * max(z, 1) + torch.finfo(x.dtype).eps) * largest(right)
        assert off(ours, right) <= off(torchs, right) + slack
    return found


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_no_larger_than_that_of_torch(dtype, tile, launched):
    """More than one tile each way, none of them full. By the norm, and apart from 4 roundings to
    float32: powers of 2 in place of e cost one of each logit and two of each log-sum-exp."""
    launched(TILES[tile])
    given = *problem(150, 300, 72, dtype), 0.7
    found, wanted = check(*given), exact(*given)
    wrong = [[error(x.double(), y) for x, y in zip(r, wanted)]
             for r in (found, run(plain, *given))]
    print(f"relative errors of values, dH, dW: {wrong[0]}, of torch {wrong[1]}")
    assert all(ours <= torchs + 4 * U32 for ours, torchs in zip(*wrong))


@pytest.mark.parametrize("T, V, D", [
    (0, 5, 4), (1, 7, 3), (1, 1, 1), (3, 1, 4), (5, 9, 1), (17, 65, 33), (65, 257, 7),
    (64, 64, 32), (129, 127, 65)])
@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
def test_odd_and_empty_shapes(T, V, D, dtype):
    check(*problem(T, V, D, dtype, seed=T))


SHAPES = np.random.default_rng(0).integers(1, [60, 90, 50], (20, 3)).tolist()


@pytest.mark.parametrize("i", range(len(SHAPES)))
def test_random_shapes_over_many_tiles(i, launched):
    launched(TINY_TILE)
    check(*problem(*SHAPES[i], DTYPES[i % 3], seed=i), (1.0, 0.6, 3.0)[i % 3])


def test_every_tile_has_its_program(launched):
    """19 row tiles, a group of 16 in the swizzle and 3 left over, each by three of columns."""
    launched(TINY_TILE)
    check(*problem(16 * 18 + 1, 35, 4))


@pytest.mark.parametrize("temperature", [1e-3, 0.5, 1.7, 1e3])
@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
def test_temperature(dtype, temperature):
    check(*problem(20, 70, 24, dtype), temperature)


@pytest.mark.parametrize("tile", TILES)
def test_a_temperature_for_each_row(tile, launched):
    launched(TILES[tile])
    given = problem(150, 70, 24)
    temperature = torch.linspace(0.3, 3, 150)
    found = check(*given, temperature)
    h, W, targets, _ = given
    for i in (0, 70, 149):
        alone = token_logprobs(h[i:i + 1], W, targets[i:i + 1], temperature[i])
        assert torch.equal(found[0][i], alone[0])


@pytest.mark.parametrize("temperature", [
    2, 0.7, torch.tensor(0.7), torch.full((21,), 0.7), torch.full((21,), 2),
    torch.full((21,), 0.7, dtype=torch.float64), torch.full((21,), 0.7).bfloat16(),
    torch.tensor([0.7]).expand(21)], ids=lambda x: f"{getattr(x, 'dtype', type(x))}{x}"[:40])
def test_kinds_of_temperature(temperature, monkeypatch):
    """A kernel takes 1 / temperature in float32: float64 would make it compute in float64."""
    seen, forward = [], token_logprob.forward
    monkeypatch.setattr(token_logprob, "forward", lambda *a: seen.append(a) or forward(*a))
    h, W, targets, _ = problem(21, 70, 16)
    found = token_logprobs(h, W, targets, temperature)
    flat = torch.ones(21) * temperature
    assert torch.allclose(found, token_logprobs(h, W, targets, flat.float()), rtol=1e-6)
    assert all(x.is_contiguous() for a in seen for x in a)
    assert all(a[3].dtype == torch.float32 and a[3].shape == (21,) for a in seen)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype, spread", [
    (torch.bfloat16, 1e3), (torch.float16, 1e3), (torch.float32, 1e4)], ids=str)
def test_large_logits(dtype, spread, tile, launched):
    """Thousands of nats apart: exp would overflow at 89, float16 at 65504."""
    launched(TILES[tile])
    found = check(*problem(30, 300, 16, dtype, spread=spread))
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("upstream", ["signed", "zero", "one", "expanded"])
def test_upstream(upstream):
    h, W, targets, g = problem(33, 70, 16)
    g = dict(signed=-3 * g, zero=0 * g, one=0 * g, expanded=torch.tensor(0.3).expand(33))[upstream]
    if upstream == "one":
        g[2] = -7.0
    _, dH, dW = check(h, W, targets, g)
    assert (dH[g == 0] == 0).all() and (upstream != "zero" or not dW.any())


def test_mixed_dtypes():
    """The wider dtype counts, and each gradient comes back in its own."""
    h, W, targets, g = problem(20, 70, 16)
    for a, b in ((h.bfloat16(), W), (h, W.bfloat16())):
        found = run(token_logprobs, a, b, targets, g)
        both = run(token_logprobs, a.float(), b.float(), targets, g)
        assert found[1].dtype == a.dtype and found[2].dtype == b.dtype
        assert all(torch.equal(x, y.to(x.dtype)) for x, y in zip(found, both))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_float64_goes_to_the_definition(dtype):
    h, W, targets, g = problem(9, 20, 4, torch.float64)
    W = W.to(dtype)
    found = run(token_logprobs, h, W, targets, g.double())
    assert found[0].dtype == torch.float64
    assert off(found[0], exact(h, W, targets, g)[0]) < 1e-13


def test_gradcheck():
    """Steps of 0.02 in float32: the difference quotient errs by some 0.02^2 / 6 times a third
    derivative of at most 1, and by the rounding of values of size 2, 4 U32 / 0.02: below 2e-4."""
    h, W, targets, _ = problem(4, 5, 2, spread=1.0)
    f, given = lambda h, W: token_logprobs(h, W, targets, 1.5), (h, W)
    with pytest.warns(UserWarning, match="double precision"):
        assert torch.autograd.gradcheck(f, [x.requires_grad_() for x in given],
                                        eps=0.02, atol=3e-4, rtol=0.0)


# ------------------------------------------------------- 2. bugs that shipped elsewhere

@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
def test_columns_past_the_vocabulary_have_no_weight(dtype, tile, launched):
    """All logits near -200 but one at -150: columns that are not there would have logits of 0, or
    of the last token, here the peak. Both took log-probs above 0, or far below, elsewhere."""
    launched(TILES[tile])
    V, T = 2 * TILES[tile].V + 3, 5
    W = torch.full((V, 8), -25.0).to(dtype)
    W[-1] = -18.75
    targets = torch.tensor([V - 1, 0, V - 2, V - 1, 5])
    found, _, _ = check(torch.ones(T, 8).to(dtype), W, targets, torch.linspace(-1, 1, T))
    assert (found <= 0).all() and found[0] > -1e-6 and abs(found[1] + 50) < 1e-4


def separable(p, T=12, V=300, dtype=torch.bfloat16):
    """H, W, targets, dZ of dW: token t gives its target the probability p. Its own two columns of W
    make logits with more digits than bfloat16 has, and its first column of dW is its row of dZ."""
    rng = torch.Generator().manual_seed(0)
    W, targets = 3 * torch.randn(V, 2 * T, generator=rng).to(dtype), torch.arange(T) * 23
    h, t = torch.zeros(T, 2 * T, dtype=dtype), torch.arange(T)
    h[t, 2 * t], h[t, 2 * t + 1] = 1.0, 2.0**-8
    W[targets, 2 * t] = W[targets, 2 * t + 1] = -math.inf
    logits = W[:, ::2].double() + W[:, 1::2].double() / 256
    logit = logits.logsumexp(0) + math.log(p / (1 - p))
    W[targets, 2 * t] = logit.to(dtype)
    W[targets, 2 * t + 1] = ((logit - W[targets, 2 * t].double()) * 256).to(dtype)
    return h, W, targets, lambda dW: dW[:, ::2].T


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.5, 0.99, 0.999])
def test_gradient_of_the_true_class(p, dtype, tile, launched):
    """1 - p, to a rounding of its dtype; of the logits (below 16) those in float32 make 64 U32 of
    p. Logits rounded to bfloat16 in one pass only make it wrong by several times itself."""
    launched(TILES[tile])
    h, W, targets, dZ = separable(p, dtype=dtype)
    g = torch.tensor([1.0, -1.0] * 6)  # a power of two: scales exactly
    found = dZ(run(token_logprobs, h, W, targets, g)[2])
    wanted = dZ(exact(h, W, targets, g)[2])
    t = torch.arange(len(h))
    assert (wanted[t, targets] * g - (1 - p)).abs().max() < 1e-2 * (1 - p)
    relative = (found[t, targets] / wanted[t, targets] - 1).abs().max()
    assert relative <= torch.finfo(dtype).eps / 2 + 64 * U32 / (1 - p)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.5, 0.99, 0.999])
def test_probabilities_sum_to_1(p, dtype, tile, launched):
    """So the gradient of a row's logits sums to 0, up to one rounding of each."""
    launched(TILES[tile])
    h, W, targets, dZ = separable(p, dtype=dtype)
    rows = dZ(run(token_logprobs, h, W, targets, torch.ones(len(h)))[2]).double()
    assert rows.abs().sum(1).min() > 1.9 * (1 - p)
    assert (rows.sum(1).abs() <= rows.abs().sum(1) * torch.finfo(dtype).eps / 2 + 64 * U32).all()


@pytest.mark.parametrize("tile", TILES)
def test_ignored_rows(tile, launched):
    """Exactly 0, no gradient even of a NaN upstream, and the others as if they were not there."""
    launched(TILES[tile])
    h, W, targets, g = problem(40, 70, 16)
    kept = targets != -100
    g[~kept] = torch.nan
    logp, dH, dW = run(token_logprobs, h, W, targets, g)
    assert not logp[~kept].any() and not dH[~kept].any()
    alone = run(token_logprobs, h[kept], W, targets[kept], g[kept])
    assert torch.equal(logp[kept], alone[0]) and torch.equal(dH[kept], alone[1])
    assert off(dW, alone[2].double()) <= 40 * U32 * largest(dW)  # summed in another order
    logp, dH, dW = run(token_logprobs, h, W, torch.full_like(targets, -100), g)
    assert not logp.any() and not dH.any() and not dW.any()


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("target", [70, 71, 255, 256, 10_000, 2**31, 2**32, -1, -99, -101])
def test_target_outside_the_vocabulary(target, tile, launched):
    """NaN there and nowhere else. 2^32 is 0 in 32 bits."""
    launched(TILES[tile])
    h, W, targets, g = problem(10, 70, 16)
    right = run(token_logprobs, h, W, targets, g)
    targets[4], g[4] = target, 0.0
    logp, dH, dW = run(token_logprobs, h, W, targets, g)
    assert logp[4].isnan() and not dH[4].any()
    others = torch.arange(10) != 4
    assert torch.equal(logp[others], right[0][others]) and torch.equal(dH[others], right[1][others])
    assert dW.isfinite().all()


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan])
def test_what_is_not_finite_stays_in_its_row(value, tile, launched):
    launched(TILES[tile])
    h, W, targets, g = problem(40, 300, 16)
    right = run(token_logprobs, h, W, targets, g)
    h[4, 5] = value
    logp, dH, _ = run(token_logprobs, h, W, targets, g)
    others = torch.arange(40) != 4
    assert logp[4].isnan() and dH[4].isnan().any()
    assert torch.equal(logp[others], right[0][others]) and torch.equal(dH[others], right[1][others])


def spaced(x):
    """The same numbers, every other column of a wider tensor."""
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), 7)
    wide[..., ::2] = x
    return wide[..., ::2]


def inside(x, rows=0, columns=8):
    """The same numbers in the middle of a larger tensor."""
    large = x.new_full((len(x) + 2 * rows, x.shape[1] + 2 * columns), 7)
    large[rows:len(large) - rows, columns:-columns or None] = x
    return large[rows:len(large) - rows, columns:-columns or None]


def shifted(x):
    """The same numbers, one past where torch aligns."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


LAYOUTS = dict(
    rows=lambda x: x.repeat_interleave(2, 0)[::2], columns=inside,
    odd_columns=lambda x: inside(x, 1, 3), transposed=lambda x: x.T.contiguous().T,
    spaced=spaced, shifted=shifted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operand", ["hidden", "weight", "both"])
@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
def test_layout_of_the_operands(layout, operand, dtype, launched):
    """Not a bit changes, but by the tile that an unaligned operand asks for."""
    h, W, targets, g = problem(21, 70, 64, dtype)
    other_h = LAYOUTS[layout](h) if operand != "weight" else h
    other_W = LAYOUTS[layout](W) if operand != "hidden" else W
    assert torch.equal(other_h, h) and torch.equal(other_W, W)
    tile = token_logprob.tile_for(other_h.contiguous(), other_W.contiguous())
    found = run(token_logprobs, other_h, other_W, targets, g)
    launched(tile)
    wanted = run(token_logprobs, h, W, targets, g)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))


def test_layout_of_targets_and_upstream():
    h, W, targets, g = problem(21, 70, 16)
    found = run(token_logprobs, h, W, spaced(targets), spaced(g))
    assert all(torch.equal(a, b) for a, b in zip(found, run(token_logprobs, h, W, targets, g)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_agree_to_the_bit(dtype):
    given = problem(70, 130, 24, dtype)
    first, second = run(token_logprobs, *given), run(token_logprobs, *given)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


class Launches(list):
    """Stands for a kernel: notes the grids it is launched with."""

    def __getitem__(self, grid):
        return lambda *_, **__: self.append(grid)


@pytest.mark.parametrize("kernel", ["forward_tile", "backward_tile"])
def test_rows_beyond_65535(kernel, monkeypatch, launched):
    """CUDA has room for 65535 programs along y and z, for 2^31 - 1 along x: all must be there."""
    seen = Launches()
    monkeypatch.setattr(token_logprob, kernel, seen)
    launched(Tile(1, 1, 16, 4, 2))
    T, V = 70_000, 3
    row, given = torch.ones(T), (torch.zeros(T, 8), torch.zeros(V, 8), torch.zeros(T).long())
    if kernel == "forward_tile":
        token_logprob.forward(*given, row)
    else:
        token_logprob.backward(*given, row, row, row, True, True)
    assert [np.atleast_1d(grid).tolist() for grid in seen] == [[T * V]]


def test_expanded_rows():
    """A stride of 0 is a layout too."""
    h, W, targets, g = problem(21, 70, 16)
    found = run(token_logprobs, h[:1].expand(21, 16), W, targets, g)
    wanted = run(token_logprobs, h[:1].repeat(21, 1), W, targets, g)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))


@pytest.mark.parametrize("arch, tile", [
    (80, POINTERS), (86, POINTERS), (89, POINTERS), (90, TMA), (100, TMA), (103, TMA),
    (120, POINTERS)])
def test_launch_by_architecture_alignment_and_dtype(arch, tile, monkeypatch):
    target = SimpleNamespace(get_current_target=lambda: SimpleNamespace(arch=arch))
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=target))
    monkeypatch.setattr(token_logprob, "INTERPRETED", SimpleNamespace(value=False))
    h, W = torch.zeros(4, 64).bfloat16(), torch.zeros(9, 64).bfloat16()
    for a, b in ((h, W), (h.half(), W.half()), (h[1:], W), (h[:, :56].contiguous(), W)):
        assert token_logprob.tile_for(a, b) == tile
    for a, b in ((h.float(), W.float()), (shifted(h), W), (h, shifted(W)),
                 (h[:, :63].contiguous(), W[:, :63].contiguous())):
        assert token_logprob.tile_for(a, b) == SMALL


# ------------------------------------------------------- 3. token_logprobs: memory, chunks, frozen

class Watch(TorchDispatchMode):
    """Counts what is called, inside the custom operators too, and the numbers in the largest
    tensor of floats that is made."""

    def __init__(self):
        super().__init__()
        self.calls, self.numel = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        self.calls[name] += 1
        if name.startswith("latro::"):
            op = getattr(token_logprob, "backward" if "backward" in name else "forward")
            with self:
                return op._init_fn(*args, **kwargs or {})
        out = func(*args, **kwargs or {})
        made = [t for t in tree_leaves(out) if torch.is_tensor(t) and t.is_floating_point()]
        self.numel = max([self.numel, *(t.numel() for t in made)])
        return out

    def products(self):
        return sum(self.calls[f"aten::{name}"] for name in ("mm", "mm.out", "addmm", "addmm.out",
                                                            "addmm_", "matmul", "bmm"))


@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
@pytest.mark.parametrize("frozen", ["none", "W", "H"])
def test_frozen_operands_cost_no_product(frozen, dtype):
    h, W, targets, g = problem(21, 70, 16, dtype)
    dH, dW = run(token_logprobs, h, W, targets, g)[1:]
    h.requires_grad_(frozen != "H")
    W.requires_grad_(frozen != "W")
    logp = token_logprobs(h, W, targets)
    with Watch() as watch:
        logp.backward(g)
    assert watch.products() == (2 if frozen == "none" else 1)
    assert h.grad is None if frozen == "H" else torch.equal(h.grad, dH)
    assert W.grad is None if frozen == "W" else torch.equal(W.grad, dW)


def test_without_gradients_nothing_is_saved():
    h, W, targets, _ = problem(21, 70, 16)
    assert not token_logprobs(h, W, targets).requires_grad
    with torch.no_grad():
        assert not token_logprobs(h.requires_grad_(), W, targets).requires_grad


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("columns", [1, 2, 3])
def test_chunks_of_the_vocabulary_change_nothing(columns, tile, monkeypatch, launched):
    """Six tiles of columns, the last not full, in chunks of one to three, also after a chunk with
    less of them: dW is made a chunk at a time, to the bit; dH is a sum over chunks, in float32."""
    launched(TILES[tile])
    T, V = 20, 5 * TILES[tile].V + 9 - (columns == 2) * TILES[tile].V
    given = problem(T, V, 16)
    one = run(token_logprobs, *given)
    monkeypatch.setattr(token_logprob, "DZ_BYTES", T * 4 * TILES[tile].V * columns + 3)
    with Watch() as watch:
        found = run(token_logprobs, *given)
    chunks = -(-V // (TILES[tile].V * columns))
    assert watch.products() == 2 * chunks > 2
    assert torch.equal(found[0], one[0]) and torch.equal(found[2], one[2])
    assert off(found[1], one[1].double()) <= chunks * 4 * U32 * largest(one[1])
    check(*given)


@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
def test_the_least_chunk_is_one_tile(dtype, monkeypatch, launched):
    """A sum of 24 chunks has one rounding to the gradient's dtype, not 24: it is as far from
    float64 as that of one chunk, apart from the roundings of float32."""
    launched(TINY_TILE)
    given = problem(16, 24 * 16 - 3, 16, dtype)
    whole = error(run(token_logprobs, *given)[1].double(), exact(*given)[1])
    monkeypatch.setattr(token_logprob, "DZ_BYTES", 1)
    assert error(check(*given)[1].double(), exact(*given)[1]) <= whole * 1.02 + 24 * U32


@pytest.mark.parametrize("tile", TILES)
def test_forward_holds_a_number_per_row_and_tile(tile, launched):
    """[ceil(V / 256), T], and nothing as large as [T, V]; T = 3000, so that W is smaller too."""
    launched(TILES[tile]._replace(T=1024))
    h, W, targets, _ = problem(3000, 600, 2 if tile != "tma" else 4)
    with Watch() as watch:
        token_logprobs(h, W, targets)
    assert watch.calls["latro::token_logprobs"] == 1
    assert watch.numel == max(-(-600 // TILES[tile].V) * 3000, h.numel())


def test_backward_holds_a_chunk_of_columns(monkeypatch):
    """T rows of 3 tiles at most, where they fit the buffer's bytes; here dH and dW are smaller."""
    h, W, targets, g = problem(64, 2000, 4)
    monkeypatch.setattr(token_logprob, "DZ_BYTES", 64 * 4 * (4 * SMALL.V - 1))
    logp = token_logprobs(h.requires_grad_(), W.requires_grad_(), targets)
    with Watch() as watch:
        logp.backward(g)
    assert watch.calls["latro::token_logprobs_backward"] == 1
    assert watch.numel == 64 * 3 * SMALL.V > W.numel()


# ------------------------------------------------------- 4. token_logprobs as an operator of torch

def operator_inputs():
    h, W, targets, g = problem(9, 20, 8)
    scale = torch.linspace(0.5, 2, 9)
    return h, W, targets, scale, token_logprob.forward(h, W, targets, scale)[1], g


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("needs", ["hW", "h", "W", ""])
def test_opcheck_of_the_forward_operator(needs):
    h, W, targets, scale, *_ = operator_inputs()
    h.requires_grad_("h" in needs), W.requires_grad_("W" in needs)
    torch.library.opcheck(token_logprob.forward, (h, W, targets, scale))
    logp, lse = token_logprob.forward(h, W, targets, scale)
    assert logp.requires_grad == bool(needs) and not lse.requires_grad


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
@pytest.mark.parametrize("need_h, need_w", [(True, True), (False, True), (True, False)])
def test_opcheck_of_the_backward_operator(need_h, need_w, dtype):
    h, W, *rest = operator_inputs()
    torch.library.opcheck(token_logprob.backward,
                          (h.to(dtype), W.to(dtype), *rest, need_h, need_w))


@pytest.mark.filterwarnings("ignore")
def test_torch_compile():
    """One graph for every T, with the temperature as a Python float."""
    def f(h, W, targets, temperature):
        return 2 * token_logprobs(h + 1, W, targets, temperature)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, fullgraph=True, backend=counter, dynamic=True)
    for T in (9, 12, 5):
        given = *problem(T, 20, 8, seed=T), 0.7
        found, wanted = run(compiled, *given), run(f, *given)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted))
    assert counter.frame_count == 1
    for temperature in (1.5, torch.linspace(0.5, 2, 7)):
        given = *problem(7, 20, 8), temperature
        assert all(torch.equal(a, b) for a, b in zip(run(compiled, *given), run(f, *given)))


def test_under_activation_checkpointing():
    given = problem(33, 70, 16)
    again = lambda *operands: checkpoint(token_logprobs, *operands, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(run(again, *given), run(token_logprobs, *given)))


def test_second_derivatives_are_refused():
    h, W, targets, _ = problem(9, 20, 8)
    logp = token_logprobs(h.requires_grad_(), W, targets)
    dH, = torch.autograd.grad(logp.sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="latro.token_logprobs_backward"):
        torch.autograd.grad(dH.square().sum(), h)


# ------------------------------------------------------- 5. score_rationales

def packed(K, groups=3, longest=(6, 5), seed=0, scale=1.0, dtype=torch.float32):
    """logp, logp0, spans: ragged; every third z and every seventh y empty."""
    rng = np.random.default_rng([K, seed])
    lengths = np.stack([rng.integers(1, n + 1, groups * K) for n in longest], 1)
    lengths[::3, 0], lengths[::7, 1] = 0, 0
    edges = torch.tensor([0, *lengths.cumsum().tolist()])
    logp, logp0 = torch.tensor(-scale * rng.random((2, int(edges[-1])))).to(dtype)
    return logp, logp0, (edges[:-1:2], edges[1::2], edges[2::2])


def score(*args, **options):
    """The kernel's scores, all of them float32 whatever came in."""
    found = rationale_score.score_rationales(*args, **options)
    assert all(x is None or x.dtype == torch.float32 and not x.requires_grad for x in found)
    return found


def agree(found, wanted, scale=1.0):
    """To 2e-6 of the largest number: a float32 sum of some hundred, and the definition's own."""
    for name, x, y in zip(found._fields, found, wanted):
        assert (x is None) == (y is None), name
        if x is not None:
            y = torch.as_tensor(y, dtype=torch.float64)
            assert x.shape == y.shape
            assert off(x, y) <= 2e-6 * max(scale, largest(y)), name


def in_float64(logp, logp0, spans, K, beta, **options):
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    logp0 = None if logp0 is None else logp0.double()
    definition = latro.score_rationales.__wrapped__
    return definition(logp.double(), logp0, *spans, K, beta, **wide)


OPTIONS = dict(
    elbo={}, prob=dict(reward="prob"), iwae=dict(bound="iwae"),
    weight_0=dict(answer_weight=0.0), weight_and_total=dict(answer_weight=0.3, total=100),
    prob_weight=dict(reward="prob", answer_weight=0.3),
    iwae_weight_and_total=dict(bound="iwae", answer_weight=0.3, total=100))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("K", [2, 3, 5, 16, 17, 100])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_scores_one_by_one(K, options, scale):
    """Against plain Python, a rationale at a time: rewards near to and far from each other; with a
    reference or without; penalties of each, of all or none."""
    logp, logp0, spans = packed(K, groups=2, scale=scale)
    each = torch.arange(len(spans[0])) % 3 * 0.75
    for prior, beta, penalty in ((logp0, 0.3, each), (logp0, 0.0, 0.0), (None, 0.3, 1.5)):
        found = score(logp, prior, *spans, K, beta, penalty=penalty, **OPTIONS[options])
        wanted = [*one_by_one(
            logp.tolist(), None if prior is None else prior.tolist(), [*zip(*map(list, spans))],
            K, beta, penalty=torch.as_tensor(penalty).expand(len(each)).tolist(),
            **OPTIONS[options])]
        wanted[1] = None if prior is None else wanted[1]
        agree(found, wanted)
        if prior is not None and not beta:  # a reference that has no say is still reported
            agree(found, in_float64(logp, prior, spans, K, beta, **OPTIONS[options]))


@pytest.mark.parametrize("bound", ["elbo", "iwae"])
@pytest.mark.parametrize("K, groups", [(2, 1), (3, 1), (100, 1), (2, 40), (5, 10)])
def test_one_question_and_many(K, groups, bound):
    logp, logp0, spans = packed(K, groups)
    agree(score(logp, logp0, *spans, K, 0.05, bound=bound),
          in_float64(logp, logp0, spans, K, 0.05, bound=bound))


@pytest.mark.parametrize("bound", ["elbo", "iwae"])
@pytest.mark.parametrize("K", [2, 5, 16])
@pytest.mark.parametrize("longest", [(127, 1), (128, 1), (129, 3), (512, 512), (5000, 2)])
def test_lengths_about_a_block_and_far_beyond(longest, K, bound):
    """One rationale of those lengths among short ones; sums of n terms in float32 err by less than
    n U32 of themselves: here 2e-6 of them."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 4, (2 * K, 2))
    lengths[K + 1] = longest
    edges = torch.tensor([0, *lengths.cumsum().tolist()])
    spans = edges[:-1:2], edges[1::2], edges[2::2]
    logp, logp0 = torch.tensor(-rng.random((2, int(edges[-1])))).float()
    agree(score(logp, logp0, *spans, K, 0.05, bound=bound),
          in_float64(logp, logp0, spans, K, 0.05, bound=bound), scale=sum(longest))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("values", DTYPES, ids=str)
def test_dtypes_of_spans_and_of_log_probs(dtype, values):
    """Half precision is summed in float32."""
    logp, logp0, spans = packed(5, longest=(60, 9), dtype=values)
    found = score(logp, logp0, *(x.to(dtype) for x in spans), 5, 0.3)
    agree(found, in_float64(logp, logp0, spans, 5, 0.3), scale=30)


@pytest.mark.parametrize("penalty", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_dtypes_of_penalties(penalty):
    logp, logp0, spans = packed(5)
    each = (torch.arange(len(spans[0])) % 3 > 1).to(penalty)
    agree(score(logp, logp0, *spans, 5, 0.3, penalty=each),
          in_float64(logp, logp0, spans, 5, 0.3, penalty=each))


def test_layout_of_what_is_scored():
    logp, logp0, spans = packed(5)
    each = torch.rand(len(spans[0]))
    found = score(spaced(logp), spaced(logp0), *map(spaced, spans), 5, 0.3, penalty=spaced(each))
    wanted = score(logp, logp0, *(x.contiguous() for x in spans), 5, 0.3, penalty=each)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))


@pytest.mark.parametrize("bound", ["elbo", "iwae"])
def test_tokens_of_no_rationale_have_weight_0(bound):
    """Before the first, between two and after the last: they count nowhere, not even as NaN."""
    logp, logp0, spans = packed(5)
    gap, n = 4, len(spans[0])
    shift = gap * torch.arange(1, n + 1)  # before each rationale
    place = torch.cat([torch.arange(a, b) + s for a, b, s in zip(spans[0], spans[2], shift)])
    wide, wide0 = (torch.full((len(x) + gap * (n + 1),), torch.nan) for x in (logp, logp0))
    wide[place], wide0[place] = logp, logp0
    found = score(wide, wide0, *(x + shift for x in spans), 5, 0.3, bound=bound)
    wanted = score(logp, logp0, *spans, 5, 0.3, bound=bound)
    assert all(torch.equal(a, b) for a, b in zip(found[:-1], wanted[:-1]))
    assert torch.equal(found.token_weights[place], wanted.token_weights)
    outside = torch.ones(len(wide), dtype=torch.bool).index_fill_(0, place, False)
    assert not found.token_weights[outside].any()


def rewarded(r, **options):
    """Scores of rationales whose reward is r, and the same in float64, and by the definition."""
    z0 = torch.arange(len(r)) * 2
    args = None, z0, z0 + 1, z0 + 2, len(r), 0.0
    logp = torch.stack([torch.zeros(len(r)), r], 1).flatten()
    definition = latro.score_rationales.__wrapped__
    return (score(logp, *args, **options), definition(logp.double(), *args, **options),
            definition(logp, *args, **options))


@pytest.mark.parametrize("bound", ["elbo", "iwae"])
@pytest.mark.parametrize("K", [2, 3, 16, 17, 100])
def test_differences_of_large_rewards(K, bound):
    """Rewards of -10 000 nats that differ by hundredths: both bounds take differences first. A mean
    of such rewards would be off by some of float32's steps there, 1e-3."""
    r = -1e4 + 0.05 * torch.randn(K, generator=torch.Generator().manual_seed(K))
    found, wanted, definition = rewarded(r, bound=bound)
    for name in ("advantage", "token_weights"):
        x, y, z = (getattr(s, name) for s in (found, wanted, definition))
        assert max(off(x, y), off(z, y)) <= 2e-6, name
    assert torch.equal(found.reward, r)


REWARDS = dict(
    dominant=[0.0, -50.0, -51.0, -50.5], dominant_last=[-60.0, -50.0, -52.0, 0.0],
    ties=[-1.0, -1.0, -3.0, -1.0], equal=[-2.0] * 4, two=[-0.5, -50.0], far=[0.0, -200.0, -400.0],
    near=[-1e-6, 0.0, -1e-7])


@pytest.mark.parametrize("case", REWARDS)
def test_iwae_leaves_one_out(case):
    """The best by 50 nats is worth 50, to float32's 2e-6 of it, and those it hides next to
    nothing: they agree to 2e-6 of 1."""
    r = torch.tensor(REWARDS[case])
    found, wanted, definition = rewarded(r, bound="iwae")
    for name in ("advantage", "token_weights"):
        x, y, z = (getattr(s, name).double() for s in (found, wanted, definition))
        assert ((x - y).abs() <= (z - y).abs() + 2e-6 * y.abs().clamp(min=1)).all(), name
    assert found.token_weights[1::2].sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("bound", ["elbo", "iwae"])
@pytest.mark.parametrize("r", [
    [-math.inf, -1.0, -2.0], [-1.0, -math.inf, -2.0, -2.0, -3.0], [-1.0, -math.inf],
    [-math.inf, -2.0, -math.inf]], ids=str)
def test_an_impossible_answer(r, bound):
    """log pi(y) = -inf: finite or not, each number is what the definition makes of it."""
    found, wanted, _ = rewarded(torch.tensor(r), bound=bound)
    for name, x, y in zip(found._fields, found, wanted):
        if x is not None:
            assert torch.allclose(x.double(), y, rtol=2e-6, atol=2e-6, equal_nan=True), (name, x, y)


def test_other_questions_do_not_hear_of_it():
    """Not finite in one question, the same as ever in the others."""
    logp, logp0, spans = packed(5)
    wanted = score(logp, logp0, *spans, 5, 0.3)
    logp[spans[0][6]:spans[2][6]] = torch.nan
    found = score(logp, logp0, *spans, 5, 0.3)
    assert found.advantage[5:10].isnan().all()
    for a, b in zip(found[:-1], wanted[:-1]):
        assert torch.equal(a[:5], b[:5]) and torch.equal(a[10:], b[10:])


def test_numbers_of_rationales():
    logp, logp0, spans = packed(4, groups=3)
    for K in (1, 0, -2):
        with pytest.raises(ValueError, match=f"K = {K}"):
            score(logp, logp0, *spans, K, 0.3)
    with pytest.raises(RuntimeError):  # 12 rationales in groups of 5
        score(logp, logp0, *spans, 5, 0.3)
    none = torch.zeros(0, dtype=torch.int64)
    found = score(logp, logp0, none, none, none, 4, 0.3, total=8)
    assert all(x.shape == (0,) for x in found[:-1])
    assert found.token_weights.shape == logp.shape and not found.token_weights.any()


@pytest.mark.parametrize("bound", ["elbo", "iwae"])
def test_scores_twice_agree_to_the_bit(bound):
    logp, logp0, spans = packed(7, longest=(300, 20))
    first, second = (score(logp, logp0, *spans, 7, 0.3, bound=bound) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_scoring_waits_for_no_device(monkeypatch):
    """One launch, and nothing that brings a number to the host or whose shape depends on values."""
    seen = Launches()
    monkeypatch.setattr(rationale_score, "score_question", seen)
    logp, logp0, spans = packed(5)
    with Watch() as watch:
        rationale_score.score_rationales(logp, logp0, *spans, 5, 0.3, penalty=spans[0] * 0.1)
    waits = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select",
             "unique", "_to_copy", "repeat_interleave", "segment_reduce", "copy_"}
    assert watch.calls and not waits & {name.split("::")[1].split(".")[0] for name in watch.calls}
    assert [np.atleast_1d(grid).tolist() for grid in seen] == [[3]]


def test_no_gradient_passes_through_the_scores():
    logp, logp0, spans = packed(5)
    assert not any(x.requires_grad for x in score(logp.requires_grad_(), logp0, *spans, 5, 0.3))


@pytest.mark.parametrize("case", ["penalty", "iwae"])
def test_mean_of_the_estimate_is_the_exact_gradient(case):
    """Enumerated: the weights of the kernel, in float32, make the exact gradient of the objective;
    1e-6 stands for their rounding, broken estimators are off by 1e-2."""
    args, batch = test_estimator.settings(questions=1, **test_estimator.CASES[case]), BATCH[:1]
    g, chances = test_estimator.exact(batch, args)
    assert error(test_estimator.expected(batch, chances, args), g) < 1e-6


# ------------------------------------------------------- 6. in the trainer

def spied(monkeypatch):
    """Counts the calls of both kernels' functions."""
    calls = Counter()
    for module, name in ((token_logprob, "token_logprobs"), (rationale_score, "score_rationales")):
        def spy(*args, f=getattr(module, name), **options):
            calls[f.__name__] += 1
            return f(*args, **options)
        monkeypatch.setattr(module, name, spy)
    return calls


def test_auto_means_torch_without_a_gpu(monkeypatch):
    calls = spied(monkeypatch)
    h, W, targets, _ = problem(5, 9, 4)
    logp, logp0, spans = packed(3)
    for name, interpret, fused in (("auto", "0", 0), ("auto", "1", 1), ("triton", "1", 1),
                                   ("torch", "1", 0)):
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
        kernels.use(name)
        calls.clear()
        kernels.token_logprobs(h, W, targets)
        kernels.score_rationales(logp, logp0, *spans, 3, 0.3)
        assert calls == ({"token_logprobs": 1, "score_rationales": 1} if fused else {}), name


@pytest.mark.slow
def test_triton_without_a_gpu_is_refused(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_INTERPRET")
    code, printed, errors = launch(*TINY, "--kernels", "triton", "--out", tmp_path / "out")
    assert code == 1 and printed == ""
    line, = [line for line in errors.splitlines() if line.startswith("latro.py: ")]
    assert "--kernels triton" in line and "CUDA" in line and not (tmp_path / "out").exists()


STEPS = [*TINY, "--steps", 3, "--lr", "1e-4"]


@pytest.fixture(scope="module")
def torchs(tmp_path_factory):
    """Three updates of the toy in plain torch."""
    return start(*STEPS, "--kernels", "torch", out=tmp_path_factory.mktemp("torch") / "out")


def same_curve(ours, theirs):
    """Adam makes rounding larger, by sign(g) where g is all but 0: 1e-3 of each number."""
    assert_close(untimed(rows(ours))[0], untimed(rows(theirs))[0])
    assert_close(untimed(rows(ours)), untimed(rows(theirs)), rel=1e-3)
    assert_close(rows(ours, "evals"), rows(theirs, "evals"), rel=1e-3)


def test_same_curve_as_torch(torchs, tmp_path, monkeypatch):
    calls = spied(monkeypatch)
    out = start(*STEPS, "--kernels", "triton", out=tmp_path / "out")
    assert calls["token_logprobs"] == 2 * calls["score_rationales"] >= 10  # policy and reference
    same_curve(out, torchs)


@pytest.mark.slow
def test_same_curve_on_two_processes(torchs, tmp_path):
    """Under FSDP2, whose hooks hand the kernel a whole W for as long as it needs it."""
    out = tmp_path / "out"
    code, _, errors = launch(*STEPS, "--kernels", "triton", "--checkpointing", "--out", out,
                             processes=2)
    assert code == 0, errors[-3000:]
    same_curve(out, torchs)
