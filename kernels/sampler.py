"""Sampling from any Hugging Face decoder: a prompt computed once, rows dropped as they finish.

What a row draws hangs on its own random numbers alone, not on the rows beside it.
"""

import torch
from torch import Tensor

from .attention import FAR, sees, window
from .reference import pick_tokens


class Cache:
    """All that layers want of a cache if masks and positions are given; the owner sets `length`."""

    def __init__(self, room: int):
        """`room`: tokens that will follow the first call's."""
        self.room, self.length, self.kv = room, 0, {}

    def update(self, k: Tensor, v: Tensor, layer: int, *_, **__) -> list[Tensor]:
        if layer not in self.kv:
            self.kv[layer] = [t.new_empty(*t.shape[:2], t.shape[2] + self.room, t.shape[3])
                              for t in (k, v)]
        end = self.length + k.shape[2]
        for buffer, t in zip(self.kv[layer], (k, v)):
            buffer[:, :, self.length:end] = t
        return [buffer[:, :, :end] for buffer in self.kv[layer]]

    def get_seq_length(self, layer: int = 0) -> int:
        return self.length


class Decoder:
    """K continuations of each of B prompts, a token at a time; a prompt is computed once.

    `logits` (rows, V) float32 are those of the next token. Rows start as prompt 0 K times, prompt 1
    K times, ..."""

    def __init__(self, policy, prompts: list[list[int]], K: int, room: int):
        """`room`: tokens to follow the prompts, at most."""
        self.policy, self.cache, self.reach = policy, Cache(room), window(policy.config)
        length = torch.tensor([*map(len, prompts)], device=policy.device)
        self.P, device = max(map(len, prompts)), policy.device
        self.column = torch.arange(self.P + room, device=device)
        ids = torch.tensor([[0] * (self.P - len(p)) + p for p in prompts], device=device)
        real = self.column >= self.P - length[:, None]  # prompts are padded on the left
        position = (self.column[:self.P] - self.P + length[:, None]).clamp(min=0)
        place = position.masked_fill(~real[:, :self.P], FAR)
        mask = sees(place, place, self.reach)
        self.real, self.length = real, length
        self.forward(ids, position, mask)
        self.select(torch.arange(K * len(prompts), device=device) // K)

    def forward(self, ids: Tensor, position: Tensor, mask: Tensor) -> None:
        out = self.policy(ids, position_ids=position, attention_mask=mask,
                          past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache.length += ids.shape[1]
        self.logits = out.logits[:, -1].float()

    def step(self, token: Tensor) -> None:
        """Appends a token (rows,) to every row."""
        end = self.cache.length + 1
        seen = self.real[:, :end] & (end - 1 - self.column[:end] < self.reach)
        position = self.length + end - 1 - self.P
        self.forward(token[:, None], position[:, None], seen[:, None, None])

    def select(self, rows: Tensor) -> None:
        """Keeps, repeats or drops rows, given as indices or a mask: a copy of the cache, made a
        layer at a time, so that there are never two of all."""
        self.real, self.length, self.logits = self.real[rows], self.length[rows], self.logits[rows]
        for layer, kv in self.cache.kv.items():
            self.cache.kv[layer] = [t[rows] for t in kv]


@torch.no_grad()
def sample(policy, prompts: list[list[int]], stops: list[list[int]], eos: list[int], K: int, L: int,
           uniform: Tensor | None, temperature: float = 1.0,
           room: int = 0) -> list[tuple[list[int], int, int]]:
    """K continuations of each of B prompts, driven by uniform (B K, L + room); None: greedy.

    z ends with one of `stops` (token ids), at one of `eos`, or after L tokens. With room, a z that
    L did not cut goes on to its answer, until EOS or for `room` tokens. Returns for each its
    ids, the number of those that are z and what ended it, and what did: a stop of so many tokens, 0
    for L, -1 for EOS."""
    N, device = K * len(prompts), policy.device
    uniform = None if uniform is None else uniform.to(device)
    decoder = Decoder(policy, prompts, K, L + room)
    ids = torch.full((N, L + room), -1, device=device)
    end, by = torch.zeros(2, N, dtype=torch.long, device=device)
    eos, *stops = (torch.tensor(s, device=device) for s in (eos, *stops))
    row, running = torch.arange(N, device=device), torch.ones(N, dtype=torch.bool, device=device)
    for t in range(L + room):
        chance = None if uniform is None else uniform[row, t]
        token = pick_tokens(decoder.logits, chance, temperature)
        ids[row, t] = token.where(running, -1)
        is_eos = torch.isin(token, eos)
        stop = -is_eos.long()
        for s in stops:
            if t + 1 >= len(s):
                stop = stop.where((ids[row, t + 1 - len(s):t + 1] != s).any(1), len(s))
        ended = running & (end[row] == 0) & ((stop != 0) | (t + 1 == L))
        end[row], by[row] = end[row].where(~ended, t + 1), by[row].where(~ended, stop)
        cut = (end[row] > 0) & ((by[row] == 0) | (t + 1 == end[row] + room))
        running = running & ~is_eos & ~cut
        left = int(running.sum())
        if left == 0 or t + 1 == L + room:
            break
        if left < 0.8 * len(row):  # finished rows go several at a time: each time copies the cache
            decoder.select(running)
            row, token, running = row[running], token[running], running[running]
        decoder.step(token)
    drawn = zip(ids.tolist(), end.tolist(), by.tolist())
    return [([i for i in z if i >= 0], *ended) for z, *ended in drawn]
