"""Definitions in plain torch: what every faster kernel must reproduce.

token_logprobs       log softmax(h W^T / temperature)[target], a chunk of tokens at a time
inverse_cdf_sample   a token from each row's distribution

Log-probabilities are in nats. T scored tokens, N rationales, V vocabulary, D hidden width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import definition

CHUNK = 2**25  # logits alive at once: 128 MiB of float32
BLOCK = 64  # tokens of the vocabulary that inverse_cdf_sample sums first


class Scores(NamedTuple):
    """Rewards of N rationales. (N,) float32 each; log-probs are sums over tokens, in nats."""

    logp_z: Tensor  # log pi(z|x), over every sampled token and what ended z
    logp0_z: Tensor | None  # log pi_0(z|x); None without a reference
    logp_y: Tensor  # log pi(y|x+z)
    reward: Tensor  # r
    advantage: Tensor  # A, leave-one-out
    token_weights: Tensor  # (T,): the objective's gradient is that of (token_weights * logp).sum()


@definition
def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor,
                   temperature: Tensor | float = 1.0) -> Tensor:
    """log softmax(hidden @ weight.T / temperature)[targets], as (T,) float32 nats.

    hidden (T, D) and weight (V, D), differentiable in both. targets (T,) int64; -100 gives 0 and no
    gradient. temperature: one number, or (T,). Logits are formed in float32 (float64 stays float64)
    a chunk at a time, and again in the backward pass: the [T, V] logits never exist."""
    wide = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    W = weight.to(wide)
    temperature = torch.ones_like(targets, dtype=wide) * temperature

    def chunk(h: Tensor, t: Tensor, temperature: Tensor) -> Tensor:
        logp = (h.to(wide) / temperature[:, None] @ W.T).log_softmax(-1)
        ignored = t == -100
        return logp.gather(-1, t.masked_fill(ignored, 0)[:, None])[:, 0].masked_fill(ignored, 0.0)

    rows = max(1, CHUNK // len(W))
    parts = zip(*(x.split(rows) for x in (hidden, targets, temperature)), strict=True)
    return torch.cat([checkpoint(chunk, *part, use_reentrant=False) for part in parts])


def inverse_cdf_sample(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """A token from softmax(logits / temperature) for each row: (rows, V) -> (rows,) int64.

    `uniform` (rows,) in [0, 1) is inverted through the cumulative distribution, summed in float64,
    so a row's token depends on its own number only, not on the other rows. Sums are taken over
    blocks of tokens first, then inside one block: the cumulative sum is V / 64 + 64 long instead of
    V."""
    p = (logits if temperature == 1 else logits / temperature).softmax(-1)
    padding = -p.shape[1] % BLOCK
    blocks = (F.pad(p, (0, padding)) if padding else p).unflatten(1, (-1, BLOCK))
    cdf = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    goal = uniform[:, None] * cdf[:, -1:]
    block = searchsorted_clamped(cdf, goal)
    below = F.pad(cdf, (1, 0)).gather(1, block)
    inside = blocks.take_along_dim(block[..., None], 1)[:, 0].double().cumsum(-1)
    return (block * BLOCK + searchsorted_clamped(inside, goal - below))[:, 0]


def searchsorted_clamped(cdf: Tensor, goal: Tensor) -> Tensor:
    """First index with cdf (rows, n) > goal (rows, 1), clamped to the last entry of nonzero
    probability. 0 where goal is NaN."""
    goal = goal.minimum(cdf[:, -1:].nextafter(cdf.new_zeros(())))
    index = torch.searchsorted(cdf, goal, right=True)
    return index.masked_fill(index == cdf.shape[1], 0)
