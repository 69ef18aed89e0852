"""Attention for prompts, for decoding and for question trees, and the models it is right for.

Masks are made here. transformers passes a 4D mask to the attention function unchanged.

Shapes: B prompts, R branches, S tokens of a row, Q queries, d the width of a head.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PAD_POSITION = 2**30  # a position after all others: only padding attends to padding
PAD_MULTIPLE = dict(cpu=1, cuda=64)  # sizes are rounded up: memory is reused, loads are aligned
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "phi3")  # those that the tests cover


def attention(module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float,
              layout: "Layout | None" = None, **_):
    """softmax(scaling q k^T + mask) v: the function that transformers calls in every layer.

    q (B, heads, Q, d); k, v (B, groups, S, d); mask from `additive_mask`. With a layout, q, k and v
    are the S tokens of one row and attention follows its trees. Returns (B, Q, heads, d)."""
    if layout is None:
        return grouped_attention(q, k, v, mask, scaling).transpose(1, 2), None
    return tree_attention(q, k, v, layout, scaling), None


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """(B, heads, Q, d). Heads that share keys are folded into the queries, so no key is copied."""
    o = F.scaled_dot_product_attention(q.reshape(len(q), k.shape[1], -1, q.shape[3]), k, v, mask,
                                       scale=scaling)
    return o.reshape(q.shape)


def causal_mask(query: Tensor, key: Tensor, window: float) -> Tensor:
    """Which query attends to which key, by position in the sequence: (B, Q), (B, S) -> (B, 1, Q, S)
    bool. A query attends to itself and to the window - 1 positions before it."""
    distance = query[:, :, None] - key[:, None]
    return ((distance >= 0) & (distance < window))[:, None]


def additive_mask(allowed: Tensor, like: Tensor, config) -> Tensor:
    """(B, 1, Q, S) bool -> what is added to the logits, in the dtype of `like`: 0 or -inf.

    The shape is (B, 1, heads / groups * Q, S), as grouped_attention folds the queries; it
    broadcasts if Q is 1. Made once per forward pass: SDPA would convert a bool mask in every
    layer."""
    added = torch.zeros_like(allowed, dtype=like.dtype).masked_fill_(~allowed, -math.inf)
    heads = config.num_attention_heads // config.num_key_value_heads
    return added.repeat(1, 1, heads, 1) if allowed.shape[2] > 1 else added


class Layout(NamedTuple):
    """Where the S tokens of a row of trees go for attention: B prompts in rows of width P, their R
    branches in rows of width L.

    The B P + R L slots are counted prompts first. A slot past the end of its row holds token S - 1,
    which is padding: nothing attends to it and it is not scored."""

    perm: Tensor  # (B P + R L,): the token in each slot
    inverse: Tensor  # (S,): the slot of each token
    prompt_mask: Tensor  # (B, 1, P, P) bool
    branch_mask: Tensor  # (R, 1, L, P + L) bool: a branch attends to its prompt and to itself

    def additive(self, like: Tensor, config) -> "Layout":
        """The layout with masks in the form that attention needs."""
        return self._replace(prompt_mask=additive_mask(self.prompt_mask, like, config),
                             branch_mask=additive_mask(self.branch_mask, like, config))


def build_layout(prompts: list[tuple[int, int]], branches: list[tuple[int, int]],
                 position: list[int], model: nn.Module) -> Layout:
    """The layout of prompts and branches, each given as (first token, length). `position` is each
    token's position in its own sequence. Every size leaves room for at least one padding token."""
    n, multiple = len(position), PAD_MULTIPLE[model.device.type]

    def padded(size: int) -> int:
        return size + multiple - size % multiple
    S = padded(n)

    def token_table(spans: list[tuple[int, int]]) -> Tensor:
        start, length = torch.tensor(spans).T[..., None]
        column = torch.arange(padded(int(length.max())))
        return torch.where(column < length, start + column, S - 1)

    prompt, branch = token_table(prompts), token_table(branches)
    perm = torch.cat([prompt.flatten(), branch.flatten()])
    inverse, used = torch.full((S,), prompt.shape[1] - 1), perm < n
    inverse[perm[used]] = used.nonzero()[:, 0]
    position = torch.tensor(position + [PAD_POSITION] * (S - n))
    perm, inverse, prompt, branch = (
        t.to(model.device) for t in (perm, inverse, position[prompt], position[branch]))
    keys = torch.cat([prompt.repeat_interleave(len(branches) // len(prompts), 0), branch], 1)
    window = sliding_window(model.config)
    return Layout(perm, inverse, causal_mask(prompt, prompt, window),
                  causal_mask(branch, keys, window))


class Permute(torch.autograd.Function):
    """x[perm]. Its gradient is g[inverse], a gather; autograd's own would be a scatter, which sorts
    or adds in any order. Slots of the padding token carry no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, perm: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x[perm]

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None, None]:
        return g[ctx.saved_tensors[0]], None, None


def tree_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scaling: float) -> Tensor:
    """Attention over one row of S tokens, each of which attends to its prompt and its own branch.

    Work and memory are those of R branches, each with a copy of its prompt's keys, not S^2. Returns
    (1, S, heads, d)."""
    (B, *_, P), (R, *_, L) = layout.prompt_mask.shape, layout.branch_mask.shape

    def split_rows(t: Tensor) -> tuple[Tensor, Tensor]:
        prompt, branch = Permute.apply(t[0].transpose(0, 1), layout.perm, layout.inverse).split(
            [B * P, R * (L - P)])
        return (part.view(n, -1, *part.shape[1:]).transpose(1, 2)
                for part, n in ((prompt, B), (branch, R)))

    (q_x, q_z), (k_x, k_z), (v_x, v_z) = map(split_rows, (q, k, v))
    k_z, v_z = (torch.cat([x.repeat_interleave(R // B, 0), z], 2)
                for x, z in ((k_x, k_z), (v_x, v_z)))
    o = (grouped_attention(q_x, k_x, v_x, layout.prompt_mask, scaling),
         grouped_attention(q_z, k_z, v_z, layout.branch_mask, scaling))
    o = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in o])
    return Permute.apply(o, layout.inverse, layout.perm)[None]


def sliding_window(config) -> float:
    """Tokens that a layer attends to, its own included; inf without a sliding window."""
    full = "full_attention" in (getattr(config, "layer_types", None) or [])
    return math.inf if full else getattr(config, "sliding_window", None) or math.inf


def max_context(config) -> int:
    """Positions whose RoPE angles do not depend on the length of the sequence."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return rope["original_max_position_embeddings"]
    return config.max_position_embeddings


def unsupported(config) -> list[str]:
    """The features of a model for which log-probs are not known to be exact here; [] if none."""
    features = [k for k in ("final_logit_softcapping", "attn_logit_softcapping", "logit_scale",
                            "logits_scaling", "is_encoder_decoder") if getattr(config, k, None)]
    kinds = sorted(set(getattr(config, "layer_types", None) or []))
    if len(kinds) > 1:
        features.append(f"layers of several kinds ({', '.join(kinds)})")
    if config.model_type not in ARCHITECTURES:
        features.append("an untested architecture")
    return features


def patch_model(model: nn.Module) -> nn.Module:
    """Installs this attention and disables dropout and dynamic RoPE, so that sampling and scoring
    agree. Returns the model."""
    model.set_attn_implementation("latro")
    model.model.rotary_emb.rope_type = "default"  # within max_context no frequency ever changes
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model
