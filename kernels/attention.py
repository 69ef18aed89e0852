"""Attention under any mask, and the masks of trees of rationales, for Hugging Face's layers.

Importing this module registers the attention function as "latro"; a model uses it after
`model.set_attn_implementation("latro")`. Masks are made here and pass through transformers as is.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface


def attention(module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, **_):
    """softmax(scaling q k^T + mask) v, for any number of heads to a key: grouped-query attention.

    q (B, heads, Q, d); k, v (B, groups, S, d); mask (B, 1, Q, S) bool, true where a query sees a
    key: one that sees none would be NaN. Returns (B, Q, heads, d)."""
    share = q.shape[1] // k.shape[1]
    if q.shape[2] == 1:  # decoding: heads that share keys become queries, and no key is copied
        o = F.scaled_dot_product_attention(
            q.view(len(q), k.shape[1], share, q.shape[3]), k, v, mask, scale=scaling)
        return o.view(q.shape).transpose(1, 2), None
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scaling).transpose(1, 2), None


AttentionInterface.register("latro", attention)


def window(config) -> float:
    """Tokens that a layer looks back, its own included."""
    return getattr(config, "sliding_window", None) or math.inf


def tree_mask(position: Tensor, branch: Tensor, reach: float) -> Tensor:
    """Who sees whom in a row of trunk (branch 0) and branches: (B, S), (B, S) -> (B, 1, S, S) bool.

    A token sees the trunk and its own branch, backwards, as far as `reach` in positions. Padding is
    a branch of its own, -1."""
    S = position.shape[1]
    related = (branch[:, None] == 0) | (branch[:, None] == branch[:, :, None])
    near = position[:, :, None] - position[:, None] < reach
    causal = torch.ones(S, S, dtype=torch.bool, device=position.device).tril()
    return (related & near & causal)[:, None]


def unsupported(config) -> list[str]:
    """What a model does to its logits or attention that is not done here; [] for a Llama."""
    odd = [k for k in ("final_logit_softcapping", "attn_logit_softcapping", "logit_scale",
                       "logits_scaling", "is_encoder_decoder") if getattr(config, k, None)]
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return odd + [f"layers of several kinds ({', '.join(sorted(kinds))})"] * (len(kinds) > 1)
