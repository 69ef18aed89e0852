"""Rewards of packed rationales in one launch: sums, reward, advantage, weight of each token.

One program per question. Its K rationales are the rows of a [K, BLOCK] tile, which moves along all
of them at once, each from its own offset, and keeps the sums in registers. Then K rewards give K
advantages, and a second pass writes the token weights. No atomics, so it is deterministic. The
longest rationale is found on the device, so the host never waits.

It reads 8 bytes per token (two float32 log-probs) and writes 4, for about 10 FLOPs. The 48 x 16
rationales of 500 tokens of an update are 4.6 MB, so bandwidth does not matter: the gain is one
launch instead of dozens. A tile is small, 2048 numbers in 4 warps, to leave registers for 64-bit
offsets.

The iwae bound's leave-one-out log-sum-exp takes O(K), without cancellation: the sum over the others
is at least 1 (in units of the largest term) for all but the largest itself, whose others are summed
again in units of the second largest.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import Scores

TILE = 2048  # numbers that a program handles at once; more if K needs it


@triton.jit
def sums_of(logp, z0, y0, end, longest, BLOCK: tl.constexpr, MEAN_PROB: tl.constexpr):
    """Sums of log-probs over each row's z and y, and of probabilities over y if MEAN_PROB (else 0):
    (K_PAD,) float32 each."""
    lane = tl.arange(0, BLOCK)[None, :]
    on_z = tl.zeros((z0.shape[0], BLOCK), tl.float32)
    on_y = tl.zeros((z0.shape[0], BLOCK), tl.float32)
    p_y = tl.zeros((z0.shape[0], BLOCK), tl.float32)
    for step in range(0, longest, BLOCK):
        at = z0[:, None] + step + lane
        value = tl.load(logp + at, at < end[:, None], 0.0).to(tl.float32)
        on_z += tl.where(at < y0[:, None], value, 0.0)
        on_y += tl.where(at < y0[:, None], 0.0, value)
        if MEAN_PROB:
            is_y = (at >= y0[:, None]) & (at < end[:, None])
            p_y += tl.where(is_y, tl.exp(value), 0.0)
    return tl.sum(on_z, 1), tl.sum(on_y, 1), tl.sum(p_y, 1)


@triton.jit
def leave_one_out(r, k, K: tl.constexpr):
    """log mean exp of r, of all but each, and softmax(r). r: the largest is 0; padded with -inf."""
    e = tl.exp(r)
    total = tl.sum(e, 0)
    best = tl.argmax(r, 0)
    rest = tl.where(k == best, float("-inf"), r)
    second = tl.max(rest, 0)
    second = tl.where(second > float("-inf"), second, 0.0)  # no other but the best: log 0, not NaN
    without_best = second + tl.log(tl.sum(tl.exp(rest - second), 0))
    others = tl.where(k == best, without_best, tl.log(total - tl.where(k == best, 0.0, e)))
    return tl.log(total / K), others - tl.log(1.0 * (K - 1)), e / total


@triton.jit
def score_question(logp, logp0, z_start, y_start, ends, penalties, rights, sum_z, sum0_z, sum_y,
                   reward, advantage, weights, penalty, beta, answer_weight, share,
                   K: tl.constexpr, K_PAD: tl.constexpr, BLOCK: tl.constexpr, IWAE: tl.constexpr,
                   REWARD: tl.constexpr):
    k = tl.arange(0, K_PAD)
    live, n = k < K, tl.program_id(0).to(tl.int64) * K + k
    z0, y0 = tl.load(z_start + n, live, 0), tl.load(y_start + n, live, 0)
    end = tl.load(ends + n, live, 0)
    longest = tl.max(end - z0, 0)
    logp_z, logp_y, p_y = sums_of(logp, z0, y0, end, longest, BLOCK, REWARD == "mean-prob")
    # gain: what the reward says of y. slope: how it rises with a token's log-prob.
    gain, slope = logp_y, tl.full((K_PAD,), 1.0, tl.float32)
    if REWARD == "prob":
        gain, slope = tl.exp(logp_y), tl.exp(logp_y)
    if REWARD == "mean-prob":
        length = tl.maximum(end - y0, 1).to(tl.float32)
        gain, slope = p_y / length, 1 / length
    if REWARD == "correct":
        gain, slope = tl.load(rights + n, live, 0).to(tl.float32), 0 * slope
    r = gain - penalty
    if penalties is not None:
        r -= tl.load(penalties + n, live, 0.0).to(tl.float32)
    if logp0 is not None:
        logp0_z, _, _ = sums_of(logp0, z0, y0, y0, longest, BLOCK, False)
        r -= beta * (logp_z - logp0_z)
        tl.store(sum0_z + n, logp0_z, live)
    gap = tl.where(live, r, float("-inf"))
    gap -= tl.max(gap, 0)
    if IWAE:
        whole, others, s = leave_one_out(gap, k, K)
        A = whole - others
        on_z, on_y = K * (A - beta * s), K * s
    else:
        A = (gap - tl.sum(tl.where(live, gap, 0.0), 0) / K) * (K / (K - 1))
        on_z, on_y = A, slope
    on_z, on_y = on_z * share, on_y * answer_weight * share
    tl.store(sum_z + n, logp_z, live)
    tl.store(sum_y + n, logp_y, live)
    tl.store(reward + n, r, live)
    tl.store(advantage + n, A, live)
    lane = tl.arange(0, BLOCK)[None, :]
    for step in range(0, longest, BLOCK):
        at = z0[:, None] + step + lane
        value = tl.where(at < y0[:, None], on_z[:, None], on_y[:, None])
        if REWARD == "mean-prob":  # each token of y by its own probability
            p = tl.exp(tl.load(logp + at, at < end[:, None], 0.0).to(tl.float32))
            value *= tl.where(at < y0[:, None], 1.0, p)
        tl.store(weights + at, value, at < end[:, None])


@torch.no_grad()
def score_rationales(logp: Tensor, logp0: Tensor | None, z_start: Tensor, y_start: Tensor,
                     end: Tensor, K: int, beta: float, *, bound: str = "elbo",
                     reward: str = "logp", right: Tensor | None = None,
                     answer_weight: float = 1.0, penalty: Tensor | float = 0.0,
                     total: int | None = None) -> Scores:
    """latro.score_rationales, which documents it, in one launch. All results are float32.

    Tokens of no rationale get weight 0. Raises ValueError for K < 2."""
    if K < 2:
        raise ValueError(f"K = {K}: the leave-one-out baseline needs at least 2 rationales")
    each = penalty.expand(len(end)) if isinstance(penalty, Tensor) else None
    right = right if reward == "correct" else None
    logp, logp0, z_start, y_start, end, each, right = (
        None if x is None else x.contiguous()
        for x in (logp, logp0, z_start, y_start, end, each, right))
    N, groups, rows = len(end), len(end.view(-1, K)), triton.next_power_of_2(K)
    block, share = max(16, TILE // rows), 1 / (total or max(N, 1))
    logp_z, logp0_z, logp_y, r, A = logp.new_empty(5, N, dtype=torch.float32)
    weights = torch.zeros_like(logp, dtype=torch.float32)
    with torch.cuda.device_of(logp):
        score_question[groups,](
            logp, logp0, z_start, y_start, end, each, right, logp_z, logp0_z, logp_y, r, A, weights,
            penalty if each is None else 0.0, beta, answer_weight, share, K, rows, block,
            bound == "iwae", reward, num_warps=min(32, rows * block // 512))
    return Scores(logp_z, None if logp0 is None else logp0_z, logp_y, r, A, weights)
