"""The definition of the operations in plain torch: what every faster kernel must reproduce.

token_logprobs    log softmax(h W^T / temperature)[target], a chunk of tokens at a time
pick_tokens       a token from each row's distribution
score_rationales  sums, reward, leave-one-out advantage and per-token weights of packed rationales

Log-probabilities are in nats. T scored tokens, N rationales in groups of K, V vocabulary, D width.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 2**25  # logits alive at once: 128 MiB of float32
BLOCK = 64  # tokens of the vocabulary that pick_tokens sums first


class Scores(NamedTuple):
    """What a group of rationales is worth. Sums over tokens, in nats; (N,) float32 each."""

    logp_z: Tensor  # log pi(z|x), every sampled token and the terminator included
    logp0_z: Tensor | None  # log pi_0(z|x); None without a reference
    logp_y: Tensor  # log pi(y|x+z)
    reward: Tensor  # r
    advantage: Tensor  # A, leave-one-out
    weights: Tensor  # (T,): the gradient of the objective is that of (weights * logp).sum()


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor,
                   temperature: Tensor | float = 1.0) -> Tensor:
    """log softmax(hidden @ weight.T / temperature)[targets], as (T,) float32.

    hidden (T, D) and weight (V, D), differentiable in both; targets (T,) int64, where -100 gives 0
    and no gradient; a temperature for all, or (T,). Logits are formed in float32 (float64 stays
    float64), a chunk at a time, and again in the backward pass: never held as [T, V]."""
    wide = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    W, heat = weight.to(wide), torch.ones_like(targets, dtype=wide) * temperature

    def chunk(h: Tensor, t: Tensor, heat: Tensor) -> Tensor:
        logp = (h.to(wide) @ W.T / heat[:, None]).log_softmax(-1)
        ignored = t == -100
        return logp.gather(-1, t.masked_fill(ignored, 0)[:, None])[:, 0].masked_fill(ignored, 0.0)

    rows = max(1, CHUNK // len(W))
    parts = zip(*(x.split(rows) for x in (hidden, targets, heat)), strict=True)
    return torch.cat([checkpoint(chunk, *part, use_reentrant=False) for part in parts])


def span_lengths(z_start: Tensor, y_start: Tensor, end: Tensor) -> Tensor:
    """Tokens of z, y of the first rationale, z, y of the second, ...: (2 N,)."""
    return torch.stack([z_start, y_start], 1).flatten().diff(append=end[-1:])


@torch.no_grad()
def span_sums(logp: Tensor, z_start: Tensor, y_start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of (T,) log-probs over each rationale's z and over its y: (N,) and (N,), nats."""
    lengths = span_lengths(z_start, y_start, end)
    return torch.segment_reduce(logp, "sum", lengths=lengths, initial=0).view(-1, 2).unbind(1)


def pick_tokens(logits: Tensor, uniform: Tensor | None, temperature: float) -> Tensor:
    """The token on which `uniform` (rows,) in [0, 1) falls in its distribution; None: the top one.

    logits (rows, V) -> (rows,). The inverse of the distribution function, summed in float64: what a
    row draws hangs on its own number alone, not on the rows beside it. First a block of tokens,
    then one of its tokens, so that V numbers are summed but only one block is accumulated."""
    if uniform is None:
        return logits.argmax(-1)
    p = (logits if temperature == 1 else logits / temperature).softmax(-1)
    rest = -p.shape[1] % BLOCK
    blocks = (F.pad(p, (0, rest)) if rest else p).unflatten(1, (-1, BLOCK))
    total = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    goal = uniform[:, None] * total[:, -1:]
    block = upto(total, goal)
    below = F.pad(total, (1, 0)).gather(1, block)
    inside = blocks.take_along_dim(block[..., None], 1)[:, 0].double().cumsum(-1)
    return (block * BLOCK + upto(inside, goal - below))[:, 0]


def upto(cdf: Tensor, goal: Tensor) -> Tensor:
    """The first place where cdf (rows, n) exceeds goal (rows, 1), or where it stops rising: the
    last thing that can happen, if rounding puts the goal behind it. NaN: 0."""
    goal = goal.minimum(cdf[:, -1:].nextafter(cdf.new_zeros(())))
    place = torch.searchsorted(cdf, goal, right=True)
    return place.masked_fill(place == cdf.shape[1], 0)


@torch.no_grad()
def score_rationales(logp: Tensor, logp0: Tensor | None, z_start: Tensor, y_start: Tensor,
                     end: Tensor, K: int, beta: float, *, bound: str = "elbo",
                     reward: str = "logp", answer_weight: float = 1.0,
                     penalty: Tensor | float = 0.0, total: int | None = None) -> Scores:
    """Rewards, advantages and token weights of N rationales packed one after the other.

    logp, logp0 (T,): log-probs of policy and reference (None: no KL term). Rationale n owns tokens
    z_start[n] : y_start[n] (z) and y_start[n] : end[n] (y); z_start[n + 1] = end[n]; no z is fine.
    Neighbouring groups of K answer the same question. `penalty` (N,) nats is taken off the reward.
    `total` is the number of rationales to average over (default N).

    elbo  r = log pi(y|x+z) - beta log(pi(z)/pi_0(z)) - penalty, or pi(y|x+z) in place of its log
          (reward="prob", arXiv 2505.21493); A_k = r_k - mean of the other r (eq. 4, 2411.04282)
    iwae  L = log mean_k exp r_k; A_k = L - L without k; arXiv 2503.19618. A question's share of the
          gradient goes to rationale k by s = softmax(r); beta s_k is left of the KL's own gradient.

    Raises ValueError for K < 2: a single rationale has no baseline.
    """
    if K < 2:
        raise ValueError(f"K = {K}: the leave-one-out baseline needs at least 2 rationales")
    logp_z, logp_y = span_sums(logp, z_start, y_start, end)
    logp0_z = None if logp0 is None else span_sums(logp0, z_start, y_start, end)[0]
    beta, log_ratio = (0.0, 0.0) if logp0 is None else (beta, logp_z - logp0_z)
    gain = logp_y.exp() if reward == "prob" else logp_y
    r = gain - beta * log_ratio - penalty
    gap = r.view(-1, K)
    gap = gap - gap.amax(1, keepdim=True)  # only differences count: spend no digits on the rest
    if bound == "iwae":
        A, on_z, on_y = iwae_credit(gap, beta)
    else:
        A, on_z, on_y = elbo_credit(gap, gain.view(-1, K) if reward == "prob" else 1.0)
    weights = torch.stack([on_z, answer_weight * on_y], -1).flatten() / (total or len(end))
    weights = weights.repeat_interleave(span_lengths(z_start, y_start, end), output_size=len(logp))
    return Scores(logp_z, logp0_z, logp_y, r, A.flatten(), weights)


@torch.no_grad()
def score_given(logp: Tensor, z_start: Tensor, y_start: Tensor, end: Tensor, total: int) -> Scores:
    """Of rationales that were given, not sampled: their likelihood, with y's, is the objective."""
    logp_z, logp_y = span_sums(logp, z_start, y_start, end)
    weights = torch.full_like(logp, 1 / total)
    return Scores(logp_z, None, logp_y, logp_z + logp_y, torch.zeros_like(logp_y), weights)


def elbo_credit(r: Tensor, slope: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """A and the weights of z and y, (B, K) each; `slope`: the reward's derivative by log pi(y)."""
    K = r.shape[1]
    A = (r - r.mean(1, keepdim=True)) * (K / (K - 1))
    return A, A, slope * torch.ones_like(r)


def iwae_credit(r: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same for L = log mean_k exp r_k; the shares of a question sum to 1, hence the K."""
    K = r.shape[1]
    others = r[:, None].expand(-1, K, K).masked_fill(torch.eye(K, device=r.device) > 0, -math.inf)
    A = r.logsumexp(1, keepdim=True) - math.log(K) - (others.logsumexp(2) - math.log(K - 1))
    share = r.softmax(1)
    return A, K * (A - beta * share), K * share
