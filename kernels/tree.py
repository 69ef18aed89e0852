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

from .attention import FAR, Layout, sees, window

GRAIN = dict(cpu=1, cuda=64)  # sizes are multiples of it: memory is used again, loads are aligned


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
    """Questions and their rationales in one row of S tokens, and the T tokens whose log-probs are
    wanted.

    Hidden state sources[t] of the row predicts targets[t]: first the actions, then the y of every
    rationale in turn."""

    ids: Tensor  # (1, S)
    position: Tensor  # (1, S)
    layout: Layout
    sources: Tensor  # (T,)
    targets: Tensor  # (T,)
    temperature: Tensor  # (T,): that of sampling on actions, 1 on y
    offsets: list[Tensor]  # z_start, y_start, end in T of each rationale: (N,) each


def tree_size(example, group: list[Rationale]) -> int:
    """Tokens of a question and its rationales."""
    return len(example.x) + sum(r.context + len(r.y) - 1 for r in group)


def packs(sizes: list[int], budget: int) -> list[list[int]]:
    """Neighbours that share a forward pass: their sizes add up to the budget at most, or it is a
    single one."""
    found, left = [], 0
    for i, size in enumerate(sizes):
        if size > left:
            found, left = [*found, []], budget
        found[-1].append(i)
        left -= size
    return found


def plant(prompts: list[list[int]], groups: list[list[Rationale]], temperature: float,
          policy) -> Tree:
    """The trees of some prompts, each with its group of K rationales, on the policy's device."""
    ids, position, sources, targets, edges, trunks, branches = [], [], [], [], [0], [], []
    for x, group in zip(prompts, groups, strict=True):
        trunks.append((len(ids), len(x)))
        ids += x
        position += range(len(x))
        fork = len(ids) - 1
        for r in group:
            tokens = r.actions[:r.context] + r.y[:-1]
            branches.append((len(ids), len(tokens)))
            path = [fork, *range(len(ids), len(ids) + len(tokens))]
            sources += path[:len(r.actions)] + path[r.context:]
            targets += r.actions + r.y
            edges += [len(targets) - len(r.y), len(targets)]
            ids += tokens
            position += range(len(x), len(x) + len(tokens))
    layout = lay(trunks, branches, position, policy)
    ids, position = (values + [0] * (len(layout.back) - len(values)) for values in (ids, position))
    ids, position, sources, targets, edges = (
        torch.tensor(t).to(policy.device) for t in (ids, position, sources, targets, edges))
    heat = torch.tensor([temperature, 1.0], device=policy.device)
    heat = heat.repeat(len(edges) // 2).repeat_interleave(edges.diff(), output_size=len(targets))
    return Tree(ids[None], position[None], layout, sources, targets, heat,
                [edges[:-1:2], edges[1::2], edges[2::2]])


def lay(trunks: list[tuple[int, int]], branches: list[tuple[int, int]], position: list[int],
        policy) -> Layout:
    """The layout of trunks and branches, first token and length each, of tokens at `position`; at
    least one place and one token more than are needed."""
    n, grain = len(position), GRAIN[policy.device.type]
    above = lambda size: size + grain - size % grain
    S = above(n)

    def rows(spans: list[tuple[int, int]]) -> Tensor:
        start, length = torch.tensor(spans).T[..., None]
        column = torch.arange(above(int(length.max())))
        return torch.where(column < length, start + column, S - 1)

    trunk, branch = rows(trunks), rows(branches)
    into = torch.cat([trunk.flatten(), branch.flatten()])
    back, taken = torch.full((S,), trunk.shape[1] - 1), into < n
    back[into[taken]] = taken.nonzero()[:, 0]
    place = torch.tensor(position + [FAR] * (S - n))
    into, back, trunk, branch = (
        t.to(policy.device) for t in (into, back, place[trunk], place[branch]))
    behind = torch.cat([trunk.repeat_interleave(len(branches) // len(trunks), 0), branch], 1)
    reach = window(policy.config)
    return Layout(into, back, sees(trunk, trunk, reach), sees(branch, behind, reach))
