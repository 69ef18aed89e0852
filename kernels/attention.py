"""Attention under any mask, the masks of trees of rationales, and the models these are right for.

Masks are made here; transformers hands 4D masks to the attention function as they are.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FAR = 2**30  # a position behind all others
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "phi3")  # those that the tests cover


def attention(module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float,
              layout: "Layout | None" = None, **_):
    """softmax(scaling q k^T + mask) v: what transformers calls in every layer.

    q (B, heads, Q, d); k, v (B, groups, S, d); mask as from `bias`. With a layout, of its S tokens
    in one row. Returns (B, Q, heads, d)."""
    if layout is None:
        return attend(q, k, v, mask, scaling).transpose(1, 2), None
    return among_branches(q, k, v, layout, scaling), None


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """(B, heads, Q, d). Heads that share keys become queries of one: no key is copied."""
    o = F.scaled_dot_product_attention(q.reshape(len(q), k.shape[1], -1, q.shape[3]), k, v, mask,
                                       scale=scaling)
    return o.reshape(q.shape)


def bias(sees: Tensor, like: Tensor, config) -> Tensor:
    """(B, 1, Q, S) bool -> what is added to logits, in the dtype of `like`: 0 where a query sees a
    key, else -inf; (B, 1, heads / groups Q, S), as `attend` has them, or broadcast if Q is 1. A
    query that sees nothing would be NaN. Made once, where SDPA would make it in every layer."""
    added = torch.zeros_like(sees, dtype=like.dtype).masked_fill_(~sees, -math.inf)
    share = config.num_attention_heads // config.num_key_value_heads
    return added.repeat(1, 1, share, 1) if sees.shape[2] > 1 else added


class Layout(NamedTuple):
    """Where S tokens, B trunks and their R branches, lie in rows of their own: P and L wide.

    The M = B P + R L places are counted trunks first; a place past the end of its row holds token
    S - 1, which nobody sees or scores."""

    into: Tensor  # (M,): the token in each place
    back: Tensor  # (S,): the place of each token
    trunks: Tensor  # (B, 1, P, P) bool: who sees whom
    branches: Tensor  # (R, 1, L, P + L) bool: the trunk's tokens, then those of the branch

    def biased(self, like: Tensor, config) -> "Layout":
        """With masks as attention wants them."""
        return self._replace(trunks=bias(self.trunks, like, config),
                             branches=bias(self.branches, like, config))


class Move(torch.autograd.Function):
    """x[into], whose gradient is gathered by `back`: index_put_ would have to sort, or add in any
    order. Places of token S - 1 have no gradient, and it takes none."""

    @staticmethod
    def forward(ctx, x: Tensor, into: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x[into]

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None, None]:
        return g[ctx.saved_tensors[0]], None, None


def among_branches(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scaling: float) -> Tensor:
    """Attention of one row of S tokens in which each sees its trunk and its own branch: work and
    memory of R branches with a copy of the trunk each, not S^2. Returns (1, S, heads, d)."""
    (B, *_, P), (R, *_, L) = layout.trunks.shape, layout.branches.shape

    def rows(t: Tensor) -> tuple[Tensor, Tensor]:
        trunk, branch = Move.apply(t[0].transpose(0, 1), layout.into, layout.back).split(
            [B * P, R * (L - P)])
        return (part.view(n, -1, *part.shape[1:]).transpose(1, 2)
                for part, n in ((trunk, B), (branch, R)))

    (q, q_z), (k, k_z), (v, v_z) = map(rows, (q, k, v))
    behind = (torch.cat([x.repeat_interleave(R // B, 0), z], 2) for x, z in ((k, k_z), (v, v_z)))
    o = attend(q, k, v, layout.trunks, scaling), attend(q_z, *behind, layout.branches, scaling)
    o = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in o])
    return Move.apply(o, layout.back, layout.into)[None]


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


def sees(query: Tensor, key: Tensor, reach: float) -> Tensor:
    """Who sees whom by positions in a sequence, (B, Q) and (B, S) -> (B, 1, Q, S) bool: backwards,
    as far as `reach`. Padding is at FAR, where only padding sees it."""
    ahead = query[:, :, None] - key[:, None]
    return ((ahead >= 0) & (ahead < reach))[:, None]


def unsupported(config) -> list[str]:
    """What about a model is not known to be right here; [] where its log-probs will be exact."""
    odd = [k for k in ("final_logit_softcapping", "attn_logit_softcapping", "logit_scale",
                       "logits_scaling", "is_encoder_decoder") if getattr(config, k, None)]
    kinds = sorted(set(getattr(config, "layer_types", None) or []))
    odd += [f"layers of several kinds ({', '.join(kinds)})"] if len(kinds) > 1 else []
    return odd + ([] if config.model_type in ARCHITECTURES else ["an untested architecture"])


def adopt(model: nn.Module) -> nn.Module:
    """The model with this attention, and free of what would part what samples from what scores."""
    model.set_attn_implementation("latro")
    model.model.rotary_emb.rope_type = "default"  # in its context no frequency ever changes
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    return model
