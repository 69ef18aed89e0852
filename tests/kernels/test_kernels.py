"""Proves that the Triton kernels compute the right values and gradients, in Triton's interpreter.

The interpreter runs the program of a tile in numpy. It shows what a kernel computes, but not
whether it compiles or how fast it is. Everything is compared with float64. Tolerances are those of
float32 and are explained where they are used. No kernel may be further from float64 than plain
torch in the same dtype.
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

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # from numpy: inf - inf, 1 / 0
TILES = dict(pointers=POINTERS, small=SMALL, tma=TMA)
TINY_TILE = Tile(16, 16, 16, 4, 2)  # gives small inputs many programs
DTYPES = torch.bfloat16, torch.float16, torch.float32
U32 = 2.0**-24  # unit roundoff of float32: the relative error of one rounding


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(kernels, "backend", "auto")


@pytest.fixture
def set_tile(monkeypatch):
    """A function that sets the tile with which the kernels are launched."""
    def set_it(tile):
        monkeypatch.setattr(token_logprob, "tile_for", lambda hidden, weight: tile)
    return set_it


# ------------------------------------------------------- 1. token_logprobs: against float64

def make_inputs(T, V, D, dtype=torch.float32, seed=0, spread=2.5):
    """hidden, weight, targets and upstream gradient. The logits have standard deviation `spread`;
    some rows are ignored, and some have an upstream gradient of 0."""
    rng = torch.Generator().manual_seed(seed)
    h, W = torch.randn(T, D, generator=rng), torch.randn(V, D, generator=rng) * spread / D**0.5
    targets, g = torch.randint(V, (T,), generator=rng), torch.randn(T, generator=rng)
    targets[3::4] = -100
    g[1::5] = 0.0
    return h.to(dtype), W.to(dtype), targets, g


def forward_backward(f, h, W, targets, g, temperature=1.0):
    """Values of f, dH and dW."""
    h, W = h.detach().requires_grad_(), W.detach().requires_grad_()
    logp = f(h, W, targets, temperature)
    logp.backward(g.to(logp.dtype))
    return logp.detach(), h.grad, W.grad


def exact_results(h, W, targets, g, temperature=1.0):
    """The same in float64, by plain torch."""
    if not len(h):
        return h[:, 0].double(), h.double(), 0 * W.double()
    return forward_backward(in_one_piece, h.double(), W.double(), targets, g, temperature)


def plain_logprobs(h, W, targets, temperature=1.0):
    """What one would write first: all logits at once, in the operands' dtype."""
    temperature = torch.as_tensor(temperature).view(-1, 1)
    logp = (F.linear(h, W).float() / temperature).log_softmax(-1)
    return logp.gather(-1, targets.clamp(min=0)[:, None])[:, 0].masked_fill(targets == -100, 0.0)


def max_abs(x):
    return float(x.abs().max()) if x.numel() else 0.0


def max_error(found, wanted):
    return max_abs(found.double() - wanted)


def check(h, W, targets, g, temperature=1.0):
    """Asserts that values, dH and dW of the kernels are no further from float64 than those of plain
    torch in the same dtype. Returns them.

    Allowed beyond that: 4 roundings to float32 of the largest logit, since both sum D products and
    torch does so in another order. They move p, and so a gradient that is exactly 0, as for V = 1.
    A gradient is rounded to its dtype twice (dZ, then the product). If it has few elements torch
    may happen to be closer, by half a rounding each time."""
    wanted = exact_results(h, W, targets, g, temperature)
    found = forward_backward(token_logprobs, h, W, targets, g, temperature)
    theirs = forward_backward(plain_logprobs, h, W, targets, g, temperature)
    definition, *_ = forward_backward(reference.token_logprobs.__wrapped__, h, W, targets, g,
                                      temperature)
    temperature = torch.as_tensor(temperature, dtype=torch.float64).view(-1, 1)
    z = max_abs(h.double() @ W.double().T / temperature)
    assert found[0].dtype == torch.float32 and (found[0][targets == -100] == 0).all()
    best_of_torch = min(max_error(theirs[0], wanted[0]), max_error(definition, wanted[0]))
    assert max_error(found[0], wanted[0]) <= best_of_torch + 4 * U32 * max(z, 1)
    for ours, plain_torch, right, x, factor in zip(found[1:], theirs[1:], wanted[1:],
                                                   (h, W), (W, h)):
        assert ours.shape == x.shape and ours.dtype == x.dtype
        slack = 4 * U32 * max(z, 1) * max(max_abs(right), max_abs(g) * max_abs(factor))
        slack += torch.finfo(x.dtype).eps * max_abs(right)
        assert max_error(ours, right) <= max_error(plain_torch, right) + slack
    return found


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_no_larger_than_that_of_torch(dtype, tile, set_tile):
    """By the norm, over several tiles in each dimension, the last ones partial. 4 roundings to
    float32 are allowed: computing with powers of 2 instead of e rounds each logit once more and
    each log-sum-exp twice."""
    set_tile(TILES[tile])
    inputs = *make_inputs(150, 300, 72, dtype), 0.7
    found, wanted = check(*inputs), exact_results(*inputs)
    errors = [[error(x.double(), y) for x, y in zip(results, wanted)]
              for results in (found, forward_backward(plain_logprobs, *inputs))]
    print(f"relative errors of values, dH, dW: {errors[0]}, of torch {errors[1]}")
    assert all(ours <= theirs + 4 * U32 for ours, theirs in zip(*errors))


@pytest.mark.parametrize("T, V, D", [
    (0, 5, 4), (1, 7, 3), (1, 1, 1), (3, 1, 4), (5, 9, 1), (17, 65, 33), (65, 257, 7),
    (64, 64, 32), (129, 127, 65)])
@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
def test_odd_and_empty_shapes(T, V, D, dtype):
    check(*make_inputs(T, V, D, dtype, seed=T))


SHAPES = np.random.default_rng(0).integers(1, [60, 90, 50], (20, 3)).tolist()


@pytest.mark.parametrize("i", range(len(SHAPES)))
def test_random_shapes_over_many_tiles(i, set_tile):
    set_tile(TINY_TILE)
    check(*make_inputs(*SHAPES[i], DTYPES[i % 3], seed=i), (1.0, 0.6, 3.0)[i % 3])


def test_every_tile_has_its_program(set_tile):
    """19 row tiles, which are one group of 16 in the swizzle and 3 more, by 3 column tiles."""
    set_tile(TINY_TILE)
    check(*make_inputs(16 * 18 + 1, 35, 4))


@pytest.mark.parametrize("temperature", [1e-3, 0.5, 1.7, 1e3])
@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
def test_temperature(dtype, temperature):
    check(*make_inputs(20, 70, 24, dtype), temperature)


@pytest.mark.parametrize("tile", TILES)
def test_temperature_per_row(tile, set_tile):
    set_tile(TILES[tile])
    inputs = make_inputs(150, 70, 24)
    temperature = torch.linspace(0.3, 3, 150)
    found = check(*inputs, temperature)
    h, W, targets, _ = inputs
    for i in (0, 70, 149):
        alone = token_logprobs(h[i:i + 1], W, targets[i:i + 1], temperature[i])
        assert torch.equal(found[0][i], alone[0])


@pytest.mark.parametrize("temperature", [
    2, 0.7, torch.tensor(0.7), torch.full((21,), 0.7), torch.full((21,), 2),
    torch.full((21,), 0.7, dtype=torch.float64), torch.full((21,), 0.7).bfloat16(),
    torch.tensor([0.7]).expand(21)], ids=lambda x: f"{getattr(x, 'dtype', type(x))}{x}"[:40])
def test_kinds_of_temperature(temperature, monkeypatch):
    """The kernel always gets 1 / temperature in float32: float64 would make it compute in
    float64."""
    calls, forward = [], token_logprob.forward

    def recorded(*operands):
        calls.append(operands)
        return forward(*operands)
    monkeypatch.setattr(token_logprob, "forward", recorded)
    h, W, targets, _ = make_inputs(21, 70, 16)
    found = token_logprobs(h, W, targets, temperature)
    flat = torch.ones(21) * temperature
    assert torch.allclose(found, token_logprobs(h, W, targets, flat.float()), rtol=1e-6)
    assert all(x.is_contiguous() for operands in calls for x in operands)
    assert all(scale.dtype == torch.float32 and scale.shape == (21,) for *_, scale in calls)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype, spread", [
    (torch.bfloat16, 1e3), (torch.float16, 1e3), (torch.float32, 1e4)], ids=str)
def test_large_logits(dtype, spread, tile, set_tile):
    """Logits that differ by thousands of nats. exp would overflow at 89, float16 at 65504."""
    set_tile(TILES[tile])
    found = check(*make_inputs(30, 300, 16, dtype, spread=spread))
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("upstream", ["signed", "zero", "one", "expanded"])
def test_upstream(upstream):
    h, W, targets, g = make_inputs(33, 70, 16)
    g = dict(signed=-3 * g, zero=0 * g, one=0 * g, expanded=torch.tensor(0.3).expand(33))[upstream]
    if upstream == "one":
        g[2] = -7.0
    _, dH, dW = check(h, W, targets, g)
    assert (dH[g == 0] == 0).all() and (upstream != "zero" or not dW.any())


def test_mixed_dtypes():
    """Computes in the wider dtype and returns each gradient in the dtype of its operand."""
    h, W, targets, g = make_inputs(20, 70, 16)
    for a, b in ((h.bfloat16(), W), (h, W.bfloat16())):
        found = forward_backward(token_logprobs, a, b, targets, g)
        both = forward_backward(token_logprobs, a.float(), b.float(), targets, g)
        assert found[1].dtype == a.dtype and found[2].dtype == b.dtype
        assert all(torch.equal(x, y.to(x.dtype)) for x, y in zip(found, both))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_float64_uses_the_definition(dtype):
    h, W, targets, g = make_inputs(9, 20, 4, torch.float64)
    W = W.to(dtype)
    found = forward_backward(token_logprobs, h, W, targets, g.double())
    assert found[0].dtype == torch.float64
    assert max_error(found[0], exact_results(h, W, targets, g)[0]) < 1e-13


def test_gradcheck():
    """With steps of 0.02 in float32. The error of the difference quotient is about 0.02^2 / 6 times
    a third derivative of at most 1, plus the rounding of values of size 2, 4 U32 / 0.02. Together
    that is below 2e-4."""
    h, W, targets, _ = make_inputs(4, 5, 2, spread=1.0)

    def f(h, W):
        return token_logprobs(h, W, targets, 1.5)
    with pytest.warns(UserWarning, match="double precision"):
        assert torch.autograd.gradcheck(f, [h.requires_grad_(), W.requires_grad_()],
                                        eps=0.02, atol=3e-4, rtol=0.0)


# ------------------------------------------------------- 2. bugs that other kernels have had

@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
def test_columns_past_the_vocabulary_do_not_count(dtype, tile, set_tile):
    """All logits are near -200, except the last token's at -150. If columns past the vocabulary
    counted, with a logit of 0 or with the last token's, log-probs would be above 0 or far below the
    right ones."""
    set_tile(TILES[tile])
    V, T = 2 * TILES[tile].V + 3, 5
    W = torch.full((V, 8), -25.0).to(dtype)
    W[-1] = -18.75
    targets = torch.tensor([V - 1, 0, V - 2, V - 1, 5])
    found, _, _ = check(torch.ones(T, 8).to(dtype), W, targets, torch.linspace(-1, 1, T))
    assert (found <= 0).all() and found[0] > -1e-6 and abs(found[1] + 50) < 1e-4


def separable(p, T=12, V=300, dtype=torch.bfloat16):
    """hidden, weight, targets, and a function that reads dZ off dW. Row t gives its target the
    probability p. It has two columns of W to itself: together they make logits with more digits
    than bfloat16 has, and in dW the first of them is the row's dZ."""
    rng = torch.Generator().manual_seed(0)
    W, targets = 3 * torch.randn(V, 2 * T, generator=rng).to(dtype), torch.arange(T) * 23
    h, t = torch.zeros(T, 2 * T, dtype=dtype), torch.arange(T)
    h[t, 2 * t], h[t, 2 * t + 1] = 1.0, 2.0**-8
    W[targets, 2 * t] = W[targets, 2 * t + 1] = -math.inf
    logits = W[:, ::2].double() + W[:, 1::2].double() / 256
    logit = logits.logsumexp(0) + math.log(p / (1 - p))
    W[targets, 2 * t] = logit.to(dtype)
    W[targets, 2 * t + 1] = ((logit - W[targets, 2 * t].double()) * 256).to(dtype)

    def dZ_of(dW):
        return dW[:, ::2].T
    return h, W, targets, dZ_of


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.5, 0.99, 0.999])
def test_gradient_of_the_true_class(p, dtype, tile, set_tile):
    """1 - p, to one rounding to its dtype. The logits are below 16, so their own rounding to
    float32 changes p by up to 64 U32. If only one of the passes rounded logits to bfloat16, the
    gradient would be wrong by several times its size."""
    set_tile(TILES[tile])
    h, W, targets, dZ_of = separable(p, dtype=dtype)
    g = torch.tensor([1.0, -1.0] * 6)  # a power of two: scales exactly
    found = dZ_of(forward_backward(token_logprobs, h, W, targets, g)[2])
    wanted = dZ_of(exact_results(h, W, targets, g)[2])
    t = torch.arange(len(h))
    assert (wanted[t, targets] * g - (1 - p)).abs().max() < 1e-2 * (1 - p)
    relative = (found[t, targets] / wanted[t, targets] - 1).abs().max()
    assert relative <= torch.finfo(dtype).eps / 2 + 64 * U32 / (1 - p)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.5, 0.99, 0.999])
def test_probabilities_sum_to_1(p, dtype, tile, set_tile):
    """The gradient of a row's logits sums to 0, up to one rounding of each."""
    set_tile(TILES[tile])
    h, W, targets, dZ_of = separable(p, dtype=dtype)
    rows = dZ_of(forward_backward(token_logprobs, h, W, targets, torch.ones(len(h)))[2]).double()
    assert rows.abs().sum(1).min() > 1.9 * (1 - p)
    assert (rows.sum(1).abs() <= rows.abs().sum(1) * torch.finfo(dtype).eps / 2 + 64 * U32).all()


@pytest.mark.parametrize("tile", TILES)
def test_ignored_rows(tile, set_tile):
    """Their values are exactly 0, and they get no gradient, even if the upstream one is NaN. The
    other rows are as if these did not exist."""
    set_tile(TILES[tile])
    h, W, targets, g = make_inputs(40, 70, 16)
    kept = targets != -100
    g[~kept] = torch.nan
    logp, dH, dW = forward_backward(token_logprobs, h, W, targets, g)
    assert not logp[~kept].any() and not dH[~kept].any()
    alone = forward_backward(token_logprobs, h[kept], W, targets[kept], g[kept])
    # Equal except for rounding: in a CPU's matrix product it depends on where a row stands.
    for ours, theirs in zip((logp[kept], dH[kept], dW), alone, strict=True):
        assert max_error(ours, theirs.double()) <= 40 * U32 * max_abs(ours)
    logp, dH, dW = forward_backward(token_logprobs, h, W, torch.full_like(targets, -100), g)
    assert not logp.any() and not dH.any() and not dW.any()


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("target", [70, 71, 255, 256, 10_000, 2**31, 2**32, -1, -99, -101])
def test_target_outside_the_vocabulary(target, tile, set_tile):
    """Gives NaN in its own row only. In 32 bits 2^32 would be token 0."""
    set_tile(TILES[tile])
    h, W, targets, g = make_inputs(10, 70, 16)
    right = forward_backward(token_logprobs, h, W, targets, g)
    targets[4], g[4] = target, 0.0
    logp, dH, dW = forward_backward(token_logprobs, h, W, targets, g)
    assert logp[4].isnan() and not dH[4].any()
    others = torch.arange(10) != 4
    assert torch.equal(logp[others], right[0][others]) and torch.equal(dH[others], right[1][others])
    assert dW.isfinite().all()


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan])
def test_nonfinite_values_stay_in_their_row(value, tile, set_tile):
    set_tile(TILES[tile])
    h, W, targets, g = make_inputs(40, 300, 16)
    right = forward_backward(token_logprobs, h, W, targets, g)
    h[4, 5] = value
    logp, dH, _ = forward_backward(token_logprobs, h, W, targets, g)
    others = torch.arange(40) != 4
    assert logp[4].isnan() and dH[4].isnan().any()
    assert torch.equal(logp[others], right[0][others]) and torch.equal(dH[others], right[1][others])


def alternate(x):
    """The same numbers, as every other column of a wider tensor."""
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), 7)
    wide[..., ::2] = x
    return wide[..., ::2]


def middle_of_larger(x, rows=0, columns=8):
    """The same numbers in the middle of a larger tensor."""
    large = x.new_full((len(x) + 2 * rows, x.shape[1] + 2 * columns), 7)
    large[rows:len(large) - rows, columns:-columns or None] = x
    return large[rows:len(large) - rows, columns:-columns or None]


def misaligned(x):
    """The same numbers, one element after an aligned address."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


LAYOUTS = dict(
    rows=lambda x: x.repeat_interleave(2, 0)[::2], columns=middle_of_larger,
    odd_columns=lambda x: middle_of_larger(x, 1, 3), transposed=lambda x: x.T.contiguous().T,
    spaced=alternate, shifted=misaligned)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operand", ["hidden", "weight", "both"])
@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
def test_layout_of_the_operands(layout, operand, dtype, set_tile):
    """Does not change a bit of the results, except through the tile, which differs for unaligned
    operands."""
    h, W, targets, g = make_inputs(21, 70, 64, dtype)
    other_h = LAYOUTS[layout](h) if operand != "weight" else h
    other_W = LAYOUTS[layout](W) if operand != "hidden" else W
    assert torch.equal(other_h, h) and torch.equal(other_W, W)
    tile = token_logprob.tile_for(other_h.contiguous(), other_W.contiguous())
    found = forward_backward(token_logprobs, other_h, other_W, targets, g)
    set_tile(tile)
    wanted = forward_backward(token_logprobs, h, W, targets, g)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))


def test_layout_of_targets_and_upstream():
    h, W, targets, g = make_inputs(21, 70, 16)
    found = forward_backward(token_logprobs, h, W, alternate(targets), alternate(g))
    wanted = forward_backward(token_logprobs, h, W, targets, g)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_agree_to_the_bit(dtype):
    inputs = make_inputs(70, 130, 24, dtype)
    first, second = (forward_backward(token_logprobs, *inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


class RecordedLaunches(list):
    """Stands for a kernel: the list of the grids it is launched with."""

    def __getitem__(self, grid):
        return lambda *_, **__: self.append(grid)


@pytest.mark.parametrize("kernel", ["forward_tile", "backward_tile"])
def test_more_rows_than_65535(kernel, monkeypatch, set_tile):
    """CUDA allows 65535 programs along y and z, and 2^31 - 1 along x. All programs are launched."""
    grids = RecordedLaunches()
    monkeypatch.setattr(token_logprob, kernel, grids)
    set_tile(Tile(1, 1, 16, 4, 2))
    T, V = 70_000, 3
    row, inputs = torch.ones(T), (torch.zeros(T, 8), torch.zeros(V, 8), torch.zeros(T).long())
    if kernel == "forward_tile":
        token_logprob.forward(*inputs, row)
    else:
        token_logprob.backward(*inputs, row, row, row, True, True)
    assert [np.atleast_1d(grid).tolist() for grid in grids] == [[T * V]]


def test_expanded_rows():
    """Operands with a stride of 0."""
    h, W, targets, g = make_inputs(21, 70, 16)
    found = forward_backward(token_logprobs, h[:1].expand(21, 16), W, targets, g)
    wanted = forward_backward(token_logprobs, h[:1].repeat(21, 1), W, targets, g)
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
    for a, b in ((h.float(), W.float()), (misaligned(h), W), (h, misaligned(W)),
                 (h[:, :63].contiguous(), W[:, :63].contiguous())):
        assert token_logprob.tile_for(a, b) == SMALL


# ------------------------------------------------------- 3. token_logprobs: memory, chunks, frozen

class OperationCounter(TorchDispatchMode):
    """Counts the operations that are called, also inside the custom operators, and the elements of
    the largest tensor of floats that any of them returns."""

    def __init__(self):
        super().__init__()
        self.calls, self.largest = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        self.calls[name] += 1
        if name.startswith("latro::"):
            op = getattr(token_logprob, "backward" if "backward" in name else "forward")
            with self:
                return op._init_fn(*args, **kwargs or {})
        out = func(*args, **kwargs or {})
        tensors = [t for t in tree_leaves(out) if torch.is_tensor(t) and t.is_floating_point()]
        self.largest = max([self.largest, *(t.numel() for t in tensors)])
        return out

    def matrix_products(self):
        return sum(self.calls[f"aten::{name}"] for name in ("mm", "mm.out", "addmm", "addmm.out",
                                                            "addmm_", "matmul", "bmm"))


@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
@pytest.mark.parametrize("frozen", ["none", "W", "H"])
def test_frozen_operands_need_no_product(frozen, dtype):
    h, W, targets, g = make_inputs(21, 70, 16, dtype)
    dH, dW = forward_backward(token_logprobs, h, W, targets, g)[1:]
    h.requires_grad_(frozen != "H")
    W.requires_grad_(frozen != "W")
    logp = token_logprobs(h, W, targets)
    with OperationCounter() as counter:
        logp.backward(g)
    assert counter.matrix_products() == (2 if frozen == "none" else 1)
    assert h.grad is None if frozen == "H" else torch.equal(h.grad, dH)
    assert W.grad is None if frozen == "W" else torch.equal(W.grad, dW)


def test_without_gradients_nothing_is_saved():
    h, W, targets, _ = make_inputs(21, 70, 16)
    assert not token_logprobs(h, W, targets).requires_grad
    with torch.no_grad():
        assert not token_logprobs(h.requires_grad_(), W, targets).requires_grad


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("columns", [1, 2, 3])
def test_chunks_of_the_vocabulary_give_the_same_gradients(columns, tile, monkeypatch, set_tile):
    """Chunks of one to three column tiles. The last tile is partial, and in one case the last chunk
    is too. dW is computed a chunk at a time, and is bit-equal. dH is a float32 sum over chunks."""
    set_tile(TILES[tile])
    T, V = 20, 5 * TILES[tile].V + 9 - (columns == 2) * TILES[tile].V
    inputs = make_inputs(T, V, 16)
    one_chunk = forward_backward(token_logprobs, *inputs)
    monkeypatch.setattr(token_logprob, "DZ_BYTES", T * 4 * TILES[tile].V * columns + 3)
    with OperationCounter() as counter:
        found = forward_backward(token_logprobs, *inputs)
    chunks = -(-V // (TILES[tile].V * columns))
    assert counter.matrix_products() == 2 * chunks > 2
    assert torch.equal(found[0], one_chunk[0]) and torch.equal(found[2], one_chunk[2])
    slack = chunks * 4 * U32 * max_abs(one_chunk[1])
    assert max_error(found[1], one_chunk[1].double()) <= slack
    check(*inputs)


@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
def test_the_smallest_chunk_is_one_tile(dtype, monkeypatch, set_tile):
    """The sum over 24 chunks is rounded once to the gradient's dtype, not 24 times. So it is as
    close to float64 as with one chunk, except for roundings to float32."""
    set_tile(TINY_TILE)
    inputs = make_inputs(16, 24 * 16 - 3, 16, dtype)
    exact_dH = exact_results(*inputs)[1]
    one_chunk = error(forward_backward(token_logprobs, *inputs)[1].double(), exact_dH)
    monkeypatch.setattr(token_logprob, "DZ_BYTES", 1)
    assert error(check(*inputs)[1].double(), exact_dH) <= one_chunk * 1.02 + 24 * U32


@pytest.mark.parametrize("tile", TILES)
def test_forward_stores_one_number_per_row_and_tile(tile, set_tile):
    """The largest tensor has T numbers for each column tile, and none is as large as [T, V]. With
    T = 3000 the weight is smaller than that too."""
    set_tile(TILES[tile]._replace(T=1024))
    h, W, targets, _ = make_inputs(3000, 600, 2 if tile != "tma" else 4)
    with OperationCounter() as counter:
        token_logprobs(h, W, targets)
    assert counter.calls["latro::token_logprobs"] == 1
    assert counter.largest == max(-(-600 // TILES[tile].V) * 3000, h.numel())


def test_backward_stores_one_chunk_of_columns(monkeypatch):
    """As many column tiles as fit into the buffer, here 3. dH and dW are smaller."""
    h, W, targets, g = make_inputs(64, 2000, 4)
    monkeypatch.setattr(token_logprob, "DZ_BYTES", 64 * 4 * (4 * SMALL.V - 1))
    logp = token_logprobs(h.requires_grad_(), W.requires_grad_(), targets)
    with OperationCounter() as counter:
        logp.backward(g)
    assert counter.calls["latro::token_logprobs_backward"] == 1
    assert counter.largest == 64 * 3 * SMALL.V > W.numel()


# ------------------------------------------------------- 4. token_logprobs as an operator of torch

def operator_inputs():
    h, W, targets, g = make_inputs(9, 20, 8)
    scale = torch.linspace(0.5, 2, 9)
    return h, W, targets, scale, token_logprob.forward(h, W, targets, scale)[1], g


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("needs", ["hW", "h", "W", ""])
def test_opcheck_of_the_forward_operator(needs):
    h, W, targets, scale, *_ = operator_inputs()
    h.requires_grad_("h" in needs)
    W.requires_grad_("W" in needs)
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
        inputs = *make_inputs(T, 20, 8, seed=T), 0.7
        found, wanted = forward_backward(compiled, *inputs), forward_backward(f, *inputs)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted))
    assert counter.frame_count == 1
    for temperature in (1.5, torch.linspace(0.5, 2, 7)):
        inputs = *make_inputs(7, 20, 8), temperature
        found, wanted = forward_backward(compiled, *inputs), forward_backward(f, *inputs)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted))


def test_under_activation_checkpointing():
    inputs = make_inputs(33, 70, 16)

    def checkpointed(*operands):
        return checkpoint(token_logprobs, *operands, use_reentrant=False)
    found = forward_backward(checkpointed, *inputs)
    wanted = forward_backward(token_logprobs, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))


def test_second_derivatives_are_refused():
    h, W, targets, _ = make_inputs(9, 20, 8)
    logp = token_logprobs(h.requires_grad_(), W, targets)
    dH, = torch.autograd.grad(logp.sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="latro.token_logprobs_backward"):
        torch.autograd.grad(dH.square().sum(), h)


# ------------------------------------------------------- 5. score_rationales

def make_rationales(K, groups=3, longest=(6, 5), seed=0, scale=1.0, dtype=torch.float32):
    """logp, logp0 and spans of rationales of different lengths. Every third z and every seventh y
    is empty."""
    rng = np.random.default_rng([K, seed])
    lengths = np.stack([rng.integers(1, n + 1, groups * K) for n in longest], 1)
    lengths[::3, 0], lengths[::7, 1] = 0, 0
    edges = torch.tensor([0, *lengths.cumsum().tolist()])
    logp, logp0 = torch.tensor(-scale * rng.random((2, int(edges[-1])))).to(dtype)
    return logp, logp0, (edges[:-1:2], edges[1::2], edges[2::2])


def score(*args, **options):
    """The kernel's scores, which are float32 whatever the dtype of the inputs."""
    found = rationale_score.score_rationales(*args, **options)
    assert all(x is None or x.dtype == torch.float32 and not x.requires_grad for x in found)
    return found


def assert_scores_agree(found, wanted, scale=1.0):
    """Asserts that scores agree to 2e-6 of the largest number, which covers float32 sums of about a
    hundred numbers on both sides."""
    for name, x, y in zip(found._fields, found, wanted):
        assert (x is None) == (y is None), name
        if x is not None:
            y = torch.as_tensor(y, dtype=torch.float64)
            assert x.shape == y.shape
            assert max_error(x, y) <= 2e-6 * max(scale, max_abs(y)), name


def in_float64(logp, logp0, spans, K, beta, **options):
    """The definition's scores in float64."""
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    logp0 = None if logp0 is None else logp0.double()
    definition = latro.score_rationales.__wrapped__
    return definition(logp.double(), logp0, *spans, K, beta, **wide)


OPTIONS = dict(
    elbo={}, prob=dict(reward="prob"), iwae=dict(bound="iwae"),
    weight_0=dict(answer_weight=0.0), weight_and_total=dict(answer_weight=0.3, total=100),
    prob_weight=dict(reward="prob", answer_weight=0.3),
    mean_prob=dict(reward="mean-prob"),
    mean_prob_weight=dict(reward="mean-prob", answer_weight=0.3),
    correct=dict(reward="correct"),
    iwae_weight_and_total=dict(bound="iwae", answer_weight=0.3, total=100))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("K", [2, 3, 5, 16, 17, 100])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_scores_one_by_one(K, options, scale):
    """Compares with plain Python, one rationale at a time: with rewards close together and far
    apart, with and without a reference, and with penalties per rationale, for all, and none."""
    logp, logp0, spans = make_rationales(K, groups=2, scale=scale)
    each, right = torch.arange(len(spans[0])) % 3 * 0.75, torch.arange(len(spans[0])) % 3 == 1
    own = OPTIONS[options] | dict(right=right)
    for prior, beta, penalty in ((logp0, 0.3, each), (logp0, 0.0, 0.0), (None, 0.3, 1.5)):
        found = score(logp, prior, *spans, K, beta, penalty=penalty, **own)
        wanted = [*one_by_one(
            logp.tolist(), None if prior is None else prior.tolist(), [*zip(*map(list, spans))],
            K, beta, penalty=torch.as_tensor(penalty).expand(len(each)).tolist(), **own)]
        wanted[1] = None if prior is None else wanted[1]
        assert_scores_agree(found, wanted)
        if prior is not None and not beta:  # with beta = 0 logp0_z is still reported
            assert_scores_agree(found, in_float64(logp, prior, spans, K, beta, **own))


@pytest.mark.parametrize("bound", ["elbo", "iwae"])
@pytest.mark.parametrize("K, groups", [(2, 1), (3, 1), (100, 1), (2, 40), (5, 10)])
def test_one_question_and_many(K, groups, bound):
    logp, logp0, spans = make_rationales(K, groups)
    assert_scores_agree(score(logp, logp0, *spans, K, 0.05, bound=bound),
                        in_float64(logp, logp0, spans, K, 0.05, bound=bound))


@pytest.mark.parametrize("bound", ["elbo", "iwae"])
@pytest.mark.parametrize("K", [2, 5, 16])
@pytest.mark.parametrize("longest", [(127, 1), (128, 1), (129, 3), (512, 512), (5000, 2)])
def test_lengths_near_a_block_and_far_beyond(longest, K, bound):
    """One rationale of these lengths among short ones. The relative error of a float32 sum of n
    terms is below n U32; here it is below 2e-6."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 4, (2 * K, 2))
    lengths[K + 1] = longest
    edges = torch.tensor([0, *lengths.cumsum().tolist()])
    spans = edges[:-1:2], edges[1::2], edges[2::2]
    logp, logp0 = torch.tensor(-rng.random((2, int(edges[-1])))).float()
    assert_scores_agree(score(logp, logp0, *spans, K, 0.05, bound=bound),
                        in_float64(logp, logp0, spans, K, 0.05, bound=bound), scale=sum(longest))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("values", DTYPES, ids=str)
def test_dtypes_of_spans_and_of_log_probs(dtype, values):
    """Half precision is summed in float32."""
    logp, logp0, spans = make_rationales(5, longest=(60, 9), dtype=values)
    found = score(logp, logp0, *(x.to(dtype) for x in spans), 5, 0.3)
    assert_scores_agree(found, in_float64(logp, logp0, spans, 5, 0.3), scale=30)


@pytest.mark.parametrize("penalty", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_dtypes_of_penalties(penalty):
    logp, logp0, spans = make_rationales(5)
    each = (torch.arange(len(spans[0])) % 3 > 1).to(penalty)
    assert_scores_agree(score(logp, logp0, *spans, 5, 0.3, penalty=each),
                        in_float64(logp, logp0, spans, 5, 0.3, penalty=each))


def test_layout_of_what_is_scored():
    logp, logp0, spans = make_rationales(5)
    each = torch.rand(len(spans[0]))
    found = score(alternate(logp), alternate(logp0), *map(alternate, spans), 5, 0.3,
                  penalty=alternate(each))
    wanted = score(logp, logp0, *(x.contiguous() for x in spans), 5, 0.3, penalty=each)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))


@pytest.mark.parametrize("bound", ["elbo", "iwae"])
def test_tokens_of_no_rationale_have_weight_0(bound):
    """Tokens before the first rationale, between two, and after the last. They affect nothing, even
    if they are NaN."""
    logp, logp0, spans = make_rationales(5)
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


def scores_of(r, **options):
    """Scores of one question's rationales with rewards r: by the kernel, by the definition in
    float64, and by the definition in float32."""
    z0 = torch.arange(len(r)) * 2
    args = None, z0, z0 + 1, z0 + 2, len(r), 0.0
    logp = torch.stack([torch.zeros(len(r)), r], 1).flatten()
    definition = latro.score_rationales.__wrapped__
    return (score(logp, *args, **options), definition(logp.double(), *args, **options),
            definition(logp, *args, **options))


@pytest.mark.parametrize("bound", ["elbo", "iwae"])
@pytest.mark.parametrize("K", [2, 3, 16, 17, 100])
def test_differences_of_large_rewards(K, bound):
    """Rewards of -10 000 nats that differ by hundredths. Both bounds take differences first. A mean
    of such rewards would be wrong by about 1e-3, float32's spacing there."""
    r = -1e4 + 0.05 * torch.randn(K, generator=torch.Generator().manual_seed(K))
    found, wanted, definition = scores_of(r, bound=bound)
    for name in ("advantage", "token_weights"):
        x, y, z = (getattr(s, name) for s in (found, wanted, definition))
        assert max(max_error(x, y), max_error(z, y)) <= 2e-6, name
    assert torch.equal(found.reward, r)


REWARDS = dict(
    dominant=[0.0, -50.0, -51.0, -50.5], dominant_last=[-60.0, -50.0, -52.0, 0.0],
    ties=[-1.0, -1.0, -3.0, -1.0], equal=[-2.0] * 4, two=[-0.5, -50.0], far=[0.0, -200.0, -400.0],
    near=[-1e-6, 0.0, -1e-7])


@pytest.mark.parametrize("case", REWARDS)
def test_iwae_leaves_one_out(case):
    """A rationale that is better than all others by 50 nats has an advantage near 50, exact to 2e-6
    of it. The others have advantages near 0, exact to 2e-6."""
    r = torch.tensor(REWARDS[case])
    found, wanted, definition = scores_of(r, bound="iwae")
    for name in ("advantage", "token_weights"):
        x, y, z = (getattr(s, name).double() for s in (found, wanted, definition))
        assert ((x - y).abs() <= (z - y).abs() + 2e-6 * y.abs().clamp(min=1)).all(), name
    assert found.token_weights[1::2].sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("bound", ["elbo", "iwae"])
@pytest.mark.parametrize("r", [
    [-math.inf, -1.0, -2.0], [-1.0, -math.inf, -2.0, -2.0, -3.0], [-1.0, -math.inf],
    [-math.inf, -2.0, -math.inf]], ids=str)
def test_an_impossible_answer(r, bound):
    """log pi(y) = -inf. Every number equals the definition's, also if it is infinite or NaN."""
    found, wanted, _ = scores_of(torch.tensor(r), bound=bound)
    for name, x, y in zip(found._fields, found, wanted):
        if x is not None:
            assert torch.allclose(x.double(), y, rtol=2e-6, atol=2e-6, equal_nan=True), (name, x, y)


def test_nonfinite_values_stay_in_their_question():
    """The scores of the other questions do not change by a bit."""
    logp, logp0, spans = make_rationales(5)
    wanted = score(logp, logp0, *spans, 5, 0.3)
    logp[spans[0][6]:spans[2][6]] = torch.nan
    found = score(logp, logp0, *spans, 5, 0.3)
    assert found.advantage[5:10].isnan().all()
    for a, b in zip(found[:-1], wanted[:-1]):
        assert torch.equal(a[:5], b[:5]) and torch.equal(a[10:], b[10:])


def test_invalid_and_empty_numbers_of_rationales():
    logp, logp0, spans = make_rationales(4, groups=3)
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
def test_two_runs_give_the_same_scores_to_the_bit(bound):
    logp, logp0, spans = make_rationales(7, longest=(300, 20))
    first, second = (score(logp, logp0, *spans, 7, 0.3, bound=bound) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_scoring_does_not_wait_for_the_device(monkeypatch):
    """One launch, and no operation that copies a number to the host or whose result's shape depends
    on values."""
    grids = RecordedLaunches()
    monkeypatch.setattr(rationale_score, "score_question", grids)
    logp, logp0, spans = make_rationales(5)
    with OperationCounter() as counter:
        rationale_score.score_rationales(logp, logp0, *spans, 5, 0.3, penalty=spans[0] * 0.1)
    waits = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select",
             "unique", "_to_copy", "repeat_interleave", "segment_reduce", "copy_"}
    called = {name.split("::")[1].split(".")[0] for name in counter.calls}
    assert called and not waits & called
    assert [np.atleast_1d(grid).tolist() for grid in grids] == [[3]]


def test_no_gradient_passes_through_the_scores():
    logp, logp0, spans = make_rationales(5)
    assert not any(x.requires_grad for x in score(logp.requires_grad_(), logp0, *spans, 5, 0.3))


@pytest.mark.parametrize("case", ["penalty", "iwae"])
def test_mean_of_the_estimate_is_the_exact_gradient(case):
    """By enumeration, as in test_latro_estimator.py, with the token weights of the kernel. 1e-6
    allows for their rounding to float32; broken estimators are wrong by 1e-2."""
    args, batch = test_estimator.settings(questions=1, **test_estimator.CASES[case]), BATCH[:1]
    g, chances = test_estimator.exact(batch, args)
    assert error(test_estimator.expected(batch, chances, args), g) < 1e-6


# ------------------------------------------------------- 6. in training

def count_kernel_calls(monkeypatch):
    """Counts the calls of both kernels' functions, by name."""
    calls = Counter()
    for module, name in ((token_logprob, "token_logprobs"), (rationale_score, "score_rationales")):
        def counted(*args, function=getattr(module, name), **options):
            calls[function.__name__] += 1
            return function(*args, **options)
        monkeypatch.setattr(module, name, counted)
    return calls


def test_auto_uses_torch_without_a_gpu(monkeypatch):
    calls = count_kernel_calls(monkeypatch)
    h, W, targets, _ = make_inputs(5, 9, 4)
    logp, logp0, spans = make_rationales(3)
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
def torch_run(tmp_path_factory):
    """Three updates of the toy in plain torch."""
    return start(*STEPS, "--kernels", "torch", out=tmp_path_factory.mktemp("torch") / "out")


def assert_same_curve(ours, theirs):
    """Asserts that two runs agree to 1e-3 of each number. Adam enlarges rounding errors: a gradient
    near 0 still moves its weight by about the learning rate, with either sign."""
    assert_close(untimed(rows(ours))[0], untimed(rows(theirs))[0])
    assert_close(untimed(rows(ours)), untimed(rows(theirs)), rel=1e-3)
    assert_close(rows(ours, "evals"), rows(theirs, "evals"), rel=1e-3)


def test_same_curve_as_torch(torch_run, tmp_path, monkeypatch):
    calls = count_kernel_calls(monkeypatch)
    out = start(*STEPS, "--kernels", "triton", out=tmp_path / "out")
    # Once while loading; then for policy and reference.
    assert calls["token_logprobs"] == 1 + 2 * calls["score_rationales"] >= 11
    assert_same_curve(out, torch_run)


@pytest.mark.slow
def test_same_curve_on_two_processes(torch_run, tmp_path):
    """Under FSDP2, whose hooks give the kernel the whole weight for as long as it needs it."""
    out = tmp_path / "out"
    code, _, errors = launch(*STEPS, "--kernels", "triton", "--checkpointing", "--out", out,
                             processes=2)
    assert code == 0, errors[-3000:]
    assert_same_curve(out, torch_run)
