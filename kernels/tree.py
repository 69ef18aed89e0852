"""The question tree: K rationales of a question in one row, its prompt computed once.

    tokens    x x x x | z1 z1 z1 y y | z2 z2 y y | ... | zK zK zK zK y
    position  0 1 2 3 | 4  5  6  7 8 | 4  5  6 7 | ... | 4  5  6  7  8
    branch    0 0 0 0 | 1  1  1  1 1 | 2  2  2 2 | ... | K  K  K  K  K

A token sees the trunk x and its own branch, backwards. So by causality one forward over the row
gives every log pi(z_k|x) and log pi(y|x+z_k), the same as K forwards over x + z_k + y would.

What counts as z and what as y: the policy ends z by writing the template ("The answer is") or EOS,
or L cuts it. How z ended is an action like any other, in the score function and in the KL.

    z ended by    actions       y
    template      z template    answer             --credit answer: stopping belongs to z
    template      z template    template answer    --credit full: the paper to the letter
    EOS           z EOS         template answer    y follows z, not EOS
    L             z             template answer
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .attention import tree_mask, window


class Rationale(NamedTuple):
    """A finished z, and the y to be scored after it. The row holds actions[:context] + y."""

    ids: list[int]  # all that was sampled; where there was room, with an answer behind z
    actions: list[int]  # z and what ended it: the tokens of pi(z|x)
    context: int  # how many of the actions y follows: not an EOS, nor what y repeats
    y: list[int]
    length: int  # tokens of z without what ended it
    cut: bool  # z ran into L


def conclude(codec, ids: list[int], end: int, by: int, answer: list[int], credit: str) -> Rationale:
    """What a draw of `sample` counts as z and as y, by the table at the top of this file.

    codec.join is the template as it follows a z, codec.lead as it opens a reply."""
    actions, length = ids[:end], end - abs(by)
    if by <= 0:
        y = (codec.join if length else codec.lead) + answer
        return Rationale(ids, actions, length, y, length, by == 0)
    if credit == "full":
        return Rationale(ids, actions, length, actions[length:] + answer, length, False)
    return Rationale(ids, actions, end, answer, length, False)


def gold_rationale(codec, z: list[int], answer: list[int]) -> Rationale:
    """A given rationale, or none, with template and answer, all of it scored: what SFT learns."""
    actions = z + (codec.join if z else codec.lead)
    return Rationale([], actions, len(actions), answer, len(z), False)


class Tree(NamedTuple):
    """A row per question, S wide, and the T tokens whose log-probs are wanted.

    Hidden state sources[t] of the flattened rows predicts targets[t]: first the actions, then the y
    of every rationale in turn."""

    ids: Tensor  # (B, S)
    position: Tensor  # (B, S)
    mask: Tensor  # (B, 1, S, S) bool
    sources: Tensor  # (T,)
    targets: Tensor  # (T,)
    temperature: Tensor  # (T,): that of sampling on actions, 1 on y
    offsets: list[Tensor]  # z_start, y_start, end in T of each rationale: (N,) each


def plant(prompts: list[list[int]], groups: list[list[Rationale]], temperature: float,
          policy) -> Tree:
    """The trees of some prompts, each with its group of rationales, on the policy's device."""
    rows, sources, targets, edges = [], [], [], [0]
    S = max(len(x) + sum(r.context + len(r.y) - 1 for r in g) for x, g in zip(prompts, groups))
    for b, (x, group) in enumerate(zip(prompts, groups, strict=True)):
        row = [(token, p, 0) for p, token in enumerate(x)]
        for branch, r in enumerate(group, 1):
            tokens = r.actions[:r.context] + r.y[:-1]
            path = [b * S + i for i in (len(x) - 1, *range(len(row), len(row) + len(tokens)))]
            row += [(token, p, branch) for p, token in enumerate(tokens, len(x))]
            sources += path[:len(r.actions)] + path[r.context:]
            targets += r.actions + r.y
            edges += [len(targets) - len(r.y), len(targets)]
        rows.append(row + [(0, 0, -1)] * (S - len(row)))

    def tensor(values: list) -> Tensor:
        return torch.tensor(values, device=policy.device)

    (ids, position, branch), edges = tensor(rows).unbind(-1), tensor(edges)
    heat = tensor([temperature, 1.0]).repeat(len(edges) // 2).repeat_interleave(edges.diff())
    return Tree(ids, position, tree_mask(position, branch, window(policy.config)), tensor(sources),
                tensor(targets), heat, [edges[:-1:2], edges[1::2], edges[2::2]])
