"""Token log-probabilities without the [T, V] logits: log softmax(H W^T / temperature)[target].

H (T, D) are hidden states, W (V, D) is the language model's head; results are in nats. A matrix
product takes 2TDV FLOPs, 17.2 TFLOP at T = 16384, D = 4096, V = 128256. The forward pass has one
product; the backward pass has three (the logits again, dH, dW), or two if W or H is frozen.

Forward: a tiled product. A tile's logits exist only in float32 registers. The tile stores one
partial log-sum-exp per row, in [V / 256, T] float32 (33 MB at that size), and the target's logit if
it lies in the tile. There are no atomic additions, so two runs are bit-equal. The work after the
product is the same for every D: per logit a maximum, an FMA, a power of 2 and a sum. Only tiles
that contain targets look for them, and only the last tile masks the end of the vocabulary.

Backward: a chunk of the *vocabulary* at a time. The same tile computes the same logits, bit for
bit, as the forward pass, and ends with dZ = (onehot - p) g, formed in float32 and rounded once.
Then cuBLAS computes dW[chunk] = dZ^T H at once and adds dZ W[chunk] to dH, which stays in float32.
Chunks of tokens instead would read and write all of dW once per chunk. Memory beyond dH and dW: at
most 268 MB for dZ, and 4TD bytes (268 MB at that size) for dH in float32.

Why these tiles: 128 x 256 is the largest whose accumulator (128 registers a thread in 8 warps)
leaves registers for the rest. The larger a tile, the less often H and W are read again: it takes
2TDV (1/128 + 1/256) bytes in bfloat16 from L2. Programs run in groups of 16 row tiles. The tiles
that run at one time (16 x 8 on 132 multiprocessors) then share 34 MB of H and W, which fit into L2,
and W is read from DRAM once per 2048 rows of H, 8.5 GB in all. Row-major order would read 67 GB. On
Hopper, TMA descriptors load the tiles, which frees the registers that pointers need.

Why nothing spills: offsets in a tile are 32 bits wide, from one 64-bit base, and the target's 1 is
subtracted from p before the factor g is loaded. With triton 3.9 on sm_90, dZ takes 155 registers
this way; it took 255 and spilled when g was added at the target instead. The price is 20 integer
instructions per step of the pointer loop on sm_80 (235 instead of 215, for 128 tensor-core
instructions); its time was not measured. Multiply-adds are written as tl.fma, since triton 3.10
will not fuse by itself.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import reference

IGNORED = -100
DZ_BYTES = 2**28  # size of the buffer for dZ, which sets the width of a vocabulary chunk
LOG2E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # on a CPU, for tests


class Tile(NamedTuple):
    """Rows, columns and depth of the product of one program, and how it is launched."""

    T: int
    V: int
    D: int
    num_warps: int
    num_stages: int
    tma: bool = False


TMA = Tile(128, 256, 64, 8, 4, tma=True)
POINTERS = Tile(128, 256, 64, 8, 3)
SMALL = Tile(64, 64, 32, 4, 2)  # for operands that cannot use the tensor cores' fast path


@triton.jit
def tile_of(T, V, BT: tl.constexpr, BV: tl.constexpr):
    """First row and column of this program's tile. Tiles run in groups of 16 row tiles, column by
    column."""
    rows, columns = tl.cdiv(T, BT), tl.cdiv(V, BV)
    pid = tl.program_id(0)
    i, j = tl.swizzle2d(pid // columns, pid % columns, rows, columns, 16)
    return i * BT, j * BV


@triton.jit
def product_tile(H, W, row, column, T, V, D, BT: tl.constexpr, BV: tl.constexpr,
                 BD: tl.constexpr, TMA: tl.constexpr):
    """[BT, BV] of H W^T in float32; values past row T or column V are undefined."""
    rows = tl.minimum(tl.arange(0, BT), T - 1 - row)[:, None] * D
    columns = tl.minimum(tl.arange(0, BV), V - 1 - column)[:, None] * D
    first_row, first_column = row.to(tl.int64) * D, column.to(tl.int64) * D
    depth = tl.arange(0, BD)[None, :]
    z = tl.zeros((BT, BV), tl.float32)
    for d in range(0, D, BD):
        if TMA:
            h, w = H.load([row, d]), W.load([column, d])
        else:
            inside = d + depth < D
            h = tl.load(H + (first_row + d) + (rows + depth), inside, 0.0)
            w = tl.load(W + (first_column + d) + (columns + depth), inside, 0.0)
        if INTERPRETED:  # numpy has no bfloat16; products of bfloat16 are exact in float32
            h, w = h.to(tl.float32), w.to(tl.float32)
        z = tl.dot(h, w.T, z, input_precision="ieee")
    return z


@triton.jit
def exp2(x):
    """2^x, flushed to 0 below 2^-126: smaller numbers would cost three more instructions."""
    if INTERPRETED:
        y = tl.exp2(x)
    else:
        asm: tl.constexpr = "ex2.approx.ftz.f32 $0, $1;"
        y = tl.inline_asm_elementwise(asm, "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def forward_tile(H, W, targets, scale, partial, chosen, T, V, D, BT: tl.constexpr,
                 BV: tl.constexpr, BD: tl.constexpr, TMA: tl.constexpr):
    row, column = tile_of(T, V, BT, BV)
    z = product_tile(H, W, row, column, T, V, D, BT, BV, BD, TMA)
    rows, columns = row + tl.arange(0, BT), column + tl.arange(0, BV)
    if column + BV > V:
        z = tl.where(columns[None, :] < V, z, float("-inf"))
    factor = tl.load(scale + rows, rows < T, 0.0)
    top = tl.max(z, 1) * (factor * LOG2E)
    total = tl.sum(exp2(tl.fma(z, (factor * LOG2E)[:, None], -top[:, None])), 1)
    lse = (top + tl.log2(total)) / LOG2E
    tl.store(partial + (column // BV).to(tl.int64) * T + rows, lse, rows < T)
    target = tl.load(targets + rows, rows < T, -1)
    here = (target >= column) & (target < tl.minimum(column + BV, V))
    if tl.max(here.to(tl.int32), 0):
        own = tl.sum(tl.where(columns[None, :] == target[:, None], z, 0.0), 1)
        tl.store(chosen + rows, own * factor, here)


@triton.jit
def backward_tile(H, W, dZ, targets, scale, lse, upstream, first, width, T, V, D,
                  BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, TMA: tl.constexpr):
    """dZ[T, width] of the vocabulary from column `first` on; width is a multiple of BV."""
    row, column = tile_of(T, width, BT, BV)
    z = product_tile(H, W, row, first + column, T, V, D, BT, BV, BD, TMA)
    rows, columns = row + tl.arange(0, BT), column + tl.arange(0, BV)
    factor, total = tl.load(scale + rows, rows < T, 0.0), tl.load(lse + rows, rows < T, 0.0)
    p = exp2(tl.fma(z, (factor * LOG2E)[:, None], -(total * LOG2E)[:, None]))
    target = tl.load(targets + rows, rows < T, -1) - first
    if tl.max(((target >= column) & (target < column + BV)).to(tl.int32), 0):
        p = tl.where(columns[None, :] == target[:, None], p - 1.0, p)
    dz = p * -tl.load(upstream + rows, rows < T, 0.0)[:, None]
    if TMA:
        dZ.store([row, column], dz.to(dZ.dtype))
    else:
        at = dZ + rows.to(tl.int64)[:, None] * width + columns[None, :]
        tl.store(at, dz.to(dZ.dtype.element_ty), (rows < T)[:, None])


def tile_for(hidden: Tensor, weight: Tensor) -> Tile:
    """How to launch. float32 avoids the tensor cores, which would round it to TF32. Fast loads need
    rows aligned to 16 bytes. TMA descriptors exist on Hopper and on later data centre GPUs."""
    aligned = hidden.shape[1] * hidden.element_size() % 16 == 0 and all(
        x.data_ptr() % 16 == 0 for x in (hidden, weight))
    if hidden.dtype == torch.float32 or not aligned:
        return SMALL
    arch = 0 if INTERPRETED.value else triton.runtime.driver.active.get_current_target().arch
    return TMA if arch // 10 in (9, 10) else POINTERS


def launch(kernel, tile: Tile, columns: int, matrices: list[Tensor], *rest) -> None:
    """Runs a kernel on every tile of [T, columns]. matrices: H, W and, in the backward pass, dZ."""
    (T, D), V = matrices[0].shape, len(matrices[1])
    if tile.tma and T:
        blocks = [tile.T, tile.D], [tile.V, tile.D], [tile.T, tile.V]
        matrices = map(TensorDescriptor.from_tensor, matrices, blocks)
    if programs := triton.cdiv(T, tile.T) * triton.cdiv(columns, tile.V):
        with torch.cuda.device_of(rest[0]):
            kernel[programs,](*matrices, *rest, T, V, D, tile.T, tile.V, tile.D, tile.tma,
                              num_warps=tile.num_warps, num_stages=tile.num_stages)


@torch.library.custom_op("latro::token_logprobs", mutates_args=())
def forward(hidden: Tensor, weight: Tensor, targets: Tensor,
            scale: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and log-sum-exps, (T,) float32 each. scale (T,): 1 / temperature."""
    tile, T, V = tile_for(hidden, weight), len(hidden), len(weight)
    partial = scale.new_empty(triton.cdiv(V, tile.V), T)
    chosen = torch.full_like(scale, torch.nan)
    launch(forward_tile, tile, V, [hidden, weight], targets, scale, partial, chosen)
    lse = partial.logsumexp(0)
    return (chosen - lse).masked_fill(targets == IGNORED, 0.0), lse


@torch.library.custom_op("latro::token_logprobs_backward", mutates_args=())
def backward(hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, lse: Tensor,
             upstream: Tensor, need_h: bool, need_w: bool) -> tuple[Tensor, Tensor]:
    """dH and dW in the operands' dtype; empty if not needed."""
    tile, (T, D), V = tile_for(hidden, weight), hidden.shape, len(weight)
    dH = scale.new_zeros(T if need_h else 0, D)
    dW = weight.new_empty(V if need_w else 0, D)
    upstream = (upstream * scale).masked_fill(targets == IGNORED, 0.0)
    most = max(1, DZ_BYTES // (max(1, T) * hidden.element_size() * tile.V))
    width = tile.V * min(most, triton.cdiv(V, tile.V))
    # The interpreter rounds to bfloat16 towards 0: there, torch does the rounding.
    buffer = hidden.new_empty(T * width, dtype=torch.float32 if INTERPRETED.value else None)
    for first in range(0, V, width):
        used = min(width, triton.cdiv(V - first, tile.V) * tile.V)
        dZ, W = buffer[:T * used].view(T, used), weight[first:first + used]
        launch(backward_tile, tile, used, [hidden, weight, dZ], targets, scale, lse, upstream,
               first, used)
        dZ = dZ[:, :len(W)].to(hidden.dtype)
        if need_w:
            torch.mm(dZ.T, hidden, out=dW[first:first + used])
        if need_h:
            add_product(dH, dZ, W)
    return dH.to(hidden.dtype), dW


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, accumulated in float32 throughout."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # CPU kernels do not multiply in one dtype and add in another
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


@forward.register_fake
def _(hidden, weight, targets, scale):
    return torch.empty_like(scale), torch.empty_like(scale)


@backward.register_fake
def _(hidden, weight, targets, scale, lse, upstream, need_h, need_w):
    return (hidden.new_empty(hidden.shape[0] if need_h else 0, hidden.shape[1]),
            weight.new_empty(weight.shape[0] if need_w else 0, weight.shape[1]))


def remember(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def gradients(ctx, upstream, _):
    need_h, need_w, *_ = ctx.needs_input_grad
    dH, dW = backward(*ctx.saved_tensors, upstream, need_h, need_w)
    return dH if need_h else None, dW if need_w else None, None, None


forward.register_autograd(gradients, setup_context=remember)


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor,
                   temperature: Tensor | float = 1.0) -> Tensor:
    """log softmax(hidden @ weight.T / temperature)[targets], as (T,) float32 nats.

    hidden (T, D) and weight (V, D) in bfloat16, float16 or float32, differentiable in both; if they
    differ, the wider dtype is used. targets (T,) int64: -100 gives 0 and no gradient, any other
    number outside the vocabulary gives NaN. temperature: one number, or (T,). Saves the operands
    and two numbers per row for the backward pass. float64 uses the definition, chunked torch."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if dtype == torch.float64:
        return reference.token_logprobs.__wrapped__(hidden, weight, targets, temperature)
    scale = (torch.ones_like(targets, dtype=torch.float32) / temperature).float()
    given = hidden.to(dtype), weight.to(dtype), targets, scale
    return forward(*(x.contiguous() for x in given))[0]
