"""Attention and key-value cache for trees of rationales: what Hugging Face's layers call.

Importing this module registers the attention function under the name "latro";
`model.set_attn_implementation("latro")` makes a model use it. Masks are built by the caller and are
passed through transformers untouched.
"""

import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface


def attention(module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float | None = None, **_):
    """softmax(q k^T scaling + mask) v for q (B, heads, Q, d), k and v (B, groups, S, d) -> (B, Q, heads, d).

    mask (B, 1, Q, S) bool, true where a query sees a key; every query must see at least one."""
    share = q.shape[1] // k.shape[1]
    if q.shape[2] == 1:  # decoding: heads that share keys become queries, so that keys are not repeated
        folded = q.view(len(q), k.shape[1], share, q.shape[3])
        return F.scaled_dot_product_attention(folded, k, v, mask, scale=scaling).view(q.shape).transpose(1, 2), None
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scaling).transpose(1, 2), None


AttentionInterface.register("latro", attention)


class Cache:
    """All that the layers ask of a cache when masks and positions are given. The caller moves `length`."""

    def __init__(self, room: int):
        """`room`: tokens that will follow the first call's."""
        self.room, self.length, self.kv = room, 0, {}

    def update(self, k: Tensor, v: Tensor, layer: int, *_, **__) -> list[Tensor]:
        if layer not in self.kv:
            self.kv[layer] = [t.new_empty(*t.shape[:2], t.shape[2] + self.room, t.shape[3]) for t in (k, v)]
        end = self.length + k.shape[2]
        for buffer, t in zip(self.kv[layer], (k, v)):
            buffer[:, :, self.length:end] = t
        return [buffer[:, :, :end] for buffer in self.kv[layer]]

    def get_seq_length(self, layer: int = 0) -> int:
        return self.length

    def select(self, rows: Tensor) -> None:
        """Keeps, repeats or drops sequences: `rows` are indices or a mask."""
        self.kv = {layer: [t[rows] for t in kv] for layer, kv in self.kv.items()}
