"""Attention for prompts, for decoding and for question trees.

Masks are made here, one for each sliding window that a model's layers have. They reach the
attention function as an argument of the model, and each layer says which window is its own.

Shapes: B prompts, R branches, S tokens of a row, Q queries, d the width of a head.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PAD_POSITION = 2**30  # a position after all others: only padding attends to padding
PAD_MULTIPLE = dict(cpu=1, cuda=64)  # sizes are rounded up: memory is reused, loads are aligned
Masks = dict[int | None, Tensor]  # by sliding window, in tokens; None: a layer that sees everything


def attention(module, q: Tensor, k: Tensor, v: Tensor, _, scaling: float,
              sliding_window: int | None = None, masks: Masks | None = None,
              layout: "Layout | None" = None, **others):
    """softmax(scaling q k^T + mask) v: the function that transformers calls in every layer.

    q (B, heads, Q, d); k, v (B, groups, S, d); masks from `additive_masks`. With a layout, q, k and
    v are the S tokens of one row and attention follows its trees. Returns (B, Q, heads, d)."""
    if layout is None:
        return grouped_attention(q, k, v, masks[sliding_window], scaling).transpose(1, 2), None
    return tree_attention(q, k, v, layout, sliding_window, scaling), None


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """(B, heads, Q, d). Heads that share keys are folded into the queries, so no key is copied."""
    o = F.scaled_dot_product_attention(q.reshape(len(q), k.shape[1], -1, q.shape[3]), k, v, mask,
                                       scale=scaling)
    return o.reshape(q.shape)


def windows(config) -> list[int | None]:
    """The sliding windows that a model's layers have, in tokens; None: no window."""
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    window = getattr(config, "sliding_window", None)
    return [*dict.fromkeys(None if kind == "full_attention" else window for kind in sorted(kinds))]


def causal_masks(query: Tensor, key: Tensor, config) -> Masks:
    """Which query attends to which key, by position in the sequence: (B, Q), (B, S) -> (B, 1, Q, S)
    bool. A query attends to itself and to the window - 1 positions before it."""
    distance = (query[:, :, None] - key[:, None])[:, None]
    return {window: (distance >= 0) & (distance < (window or math.inf))
            for window in windows(config)}


def additive_masks(masks: Masks, like: Tensor, config) -> Masks:
    """(B, 1, Q, S) bool -> what is added to the logits, in the dtype of `like`: 0 or -inf.

    The shape is (B, 1, heads / groups * Q, S), as grouped_attention folds the queries; it
    broadcasts if Q is 1. Made once per forward pass: SDPA would convert a bool mask in every
    layer."""
    heads = config.num_attention_heads // config.num_key_value_heads

    def additive(allowed: Tensor) -> Tensor:
        added = torch.zeros_like(allowed, dtype=like.dtype).masked_fill_(~allowed, -math.inf)
        return added.repeat(1, 1, heads, 1) if allowed.shape[2] > 1 else added
    return {window: additive(allowed) for window, allowed in masks.items()}


class Layout(NamedTuple):
    """Where the S tokens of a row of trees go for attention: B prompts in rows of width P, their R
    branches in rows of width L.

    The B P + R L slots are counted prompts first. A slot past the end of its row holds token S - 1,
    which is padding: nothing attends to it and it is not scored."""

    perm: Tensor  # (B P + R L,): the token in each slot
    inverse: Tensor  # (S,): the slot of each token
    prompt_masks: Masks  # (B, 1, P, P) bool
    branch_masks: Masks  # (R, 1, L, P + L) bool: a branch attends to its prompt and to itself

    def additive(self, like: Tensor, config) -> "Layout":
        """The layout with masks in the form that attention needs."""
        return self._replace(prompt_masks=additive_masks(self.prompt_masks, like, config),
                             branch_masks=additive_masks(self.branch_masks, like, config))


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
    return Layout(perm, inverse, causal_masks(prompt, prompt, model.config),
                  causal_masks(branch, keys, model.config))


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


def tree_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None,
                   scaling: float) -> Tensor:
    """Attention over one row of S tokens, each of which attends to its prompt and its own branch.

    Work and memory are those of R branches, each with a copy of its prompt's keys, not S^2. Returns
    (1, S, heads, d)."""
    prompt_mask, branch_mask = layout.prompt_masks[window], layout.branch_masks[window]
    (B, *_, P), (R, *_, L) = prompt_mask.shape, branch_mask.shape

    def split_rows(t: Tensor) -> tuple[Tensor, Tensor]:
        prompt, branch = Permute.apply(t[0].transpose(0, 1), layout.perm, layout.inverse).split(
            [B * P, R * (L - P)])
        return (part.view(n, -1, *part.shape[1:]).transpose(1, 2)
                for part, n in ((prompt, B), (branch, R)))

    (q_x, q_z), (k_x, k_z), (v_x, v_z) = map(split_rows, (q, k, v))
    k_z, v_z = (torch.cat([x.repeat_interleave(R // B, 0), z], 2)
                for x, z in ((k_x, k_z), (v_x, v_z)))
    o = (grouped_attention(q_x, k_x, v_x, prompt_mask, scaling),
         grouped_attention(q_z, k_z, v_z, branch_mask, scaling))
    o = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in o])
    return Permute.apply(o, layout.inverse, layout.perm)[None]


def max_context(config) -> int:
    """Positions whose RoPE angles do not depend on the length of the sequence."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return rope["original_max_position_embeddings"]
    return config.max_position_embeddings


def logits_divisor(config) -> float:
    """What a model divides its logits by, before any temperature (Granite)."""
    return getattr(config, "logits_scaling", None) or 1.0


def patch_model(model: nn.Module) -> nn.Module:
    """Installs this attention and disables dropout, noise in routers and dynamic RoPE, so that
    sampling and scoring agree. Returns the model."""
    model.set_attn_implementation("latro")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "jitter_noise"):
            module.jitter_noise = 0.0
        if known := getattr(module, "rope_type", None):
            # Within max_context no frequency ever changes. A type for each kind of layer, or one.
            module.rope_type = (dict.fromkeys(known, "default") if isinstance(known, dict)
                                else "default")
    return model
