"""Attention under any mask, the masks of trees of rationales, and the models these are right for.

Masks are made here; transformers hands 4D masks to the attention function as they are.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "phi3")  # those that the tests cover


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


def window(config) -> float:
    """Tokens that a layer looks back, its own included."""
    full = "full_attention" in (getattr(config, "layer_types", None) or [])
    return math.inf if full else getattr(config, "sliding_window", None) or math.inf


def context(config) -> int:
    """Positions for which a token's place in RoPE does not hang on how long its row is."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return rope["original_max_position_embeddings"]
    return config.max_position_embeddings


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
    """What about a model is not known to be right here; [] where its log-probs will be exact."""
    odd = [k for k in ("final_logit_softcapping", "attn_logit_softcapping", "logit_scale",
                       "logits_scaling", "is_encoder_decoder") if getattr(config, k, None)]
    kinds = sorted(set(getattr(config, "layer_types", None) or []))
    odd += [f"layers of several kinds ({', '.join(kinds)})"] if len(kinds) > 1 else []
    return odd + ([] if config.model_type in ARCHITECTURES else ["an untested architecture"])
