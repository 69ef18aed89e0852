"""Sampling from any Hugging Face decoder: a prompt computed once, rows dropped as they finish.

What a row draws hangs on its own random numbers alone, not on the rows beside it. A step is always
the same work on the same tensors, which the host need not wait for, so that on a GPU it is recorded
as a CUDA graph, and launched as one, for as long as the number of rows and the columns of the cache
that they look at stay what they are.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import FAR, bias, sees, window
from .reference import pick_tokens


class Pace(NamedTuple):
    """How a kind of device decodes."""

    look: int  # tokens between the host's looks at who has finished
    columns: int  # by which what is seen of the cache grows
    graphs: bool  # whether steps are recorded

    def wide(self, tokens: int) -> int:
        """Columns that are made, or seen, for so many tokens."""
        return -(-tokens // self.columns) * self.columns


PACES = dict(cpu=Pace(1, 1, False), cuda=Pace(16, 128, True))


class Cache:
    """All that layers want of a cache if masks and positions are given: one buffer of keys and one
    of values a layer, made once. First `rows` None: the prompts' own."""

    def __init__(self):
        self.kv, self.rows = {}, None

    def update(self, k: Tensor, v: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        if self.rows is None:
            self.kv[layer] = k, v
            return k, v
        for buffer, t in zip(self.kv[layer], (k, v)):
            buffer[:self.rows].index_copy_(2, self.column, t)
        return tuple(buffer[:self.rows, :, :self.width] for buffer in self.kv[layer])

    def spread(self, K: int, width: int) -> None:
        """K rows of `width` tokens for each prompt. Zeros: what is not seen counts 0 times, and
        0 x NaN is NaN."""
        for layer, kv in self.kv.items():
            self.kv[layer] = [t.new_zeros(len(t) * K, t.shape[1], width, t.shape[3]) for t in kv]
            for buffer, t in zip(self.kv[layer], kv):
                buffer.unflatten(0, (-1, K))[..., :t.shape[2], :] = t[:, None]
            self.rows, self.width = len(buffer), t.shape[2]

    def keep(self, rows: Tensor) -> None:
        """Moves some rows to the front, what is seen of them: copies of half a layer at a time."""
        self.rows = len(rows)
        for buffer in (buffer for kv in self.kv.values() for buffer in kv):
            buffer[:len(rows), :, :self.width] = buffer[rows, :, :self.width]


class Decoder:
    """K continuations of each of B prompts, a token at a time; a prompt is computed once.

    Rows start as prompt 0 K times, prompt 1 K times, ..."""

    def __init__(self, policy, prompts: list[list[int]], K: int, room: int):
        """`room`: tokens to follow the prompts, at most."""
        self.policy, self.prompts, self.K = policy, prompts, K
        self.cache, self.reach = Cache(), window(policy.config)
        self.P, self.room, device = max(map(len, prompts)), room, policy.device
        self.pace = PACES[device.type]
        self.before = torch.tensor([self.P - len(p) for p in prompts], device=device)
        self.column = torch.arange(self.P + room + self.pace.columns, device=device)
        self.end = torch.tensor([self.P], device=device)  # the column of the next token

    def begin(self) -> Tensor:
        """Reads the prompts, padded on the left, once each; returns the logits of each row."""
        ids = [[0] * (self.P - len(p)) + p for p in self.prompts]
        position = self.column[:self.P] - self.before[:, None]
        place = position.where(position >= 0, FAR)
        logits = self.forward(torch.tensor(ids, device=position.device), position.clamp(min=0),
                              sees(place, place, self.reach))
        self.cache.spread(self.K, self.pace.wide(self.P + self.room))
        self.before = self.before.repeat_interleave(self.K)
        return logits.repeat_interleave(self.K, 0)

    def forward(self, ids: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        """(rows, V) logits of the next token, in float32 from the product on."""
        W = self.policy.get_output_embeddings().weight
        mask = bias(mask, W, self.policy.config)
        h = self.policy.model(ids, position_ids=position, attention_mask=mask, use_cache=True,
                              past_key_values=self.cache).last_hidden_state[:, -1]
        if h.is_cuda and h.dtype != torch.float32:
            return torch.mm(h, W.T, out_dtype=torch.float32)
        return h.float() @ W.float().T

    def step(self, token: Tensor) -> Tensor:
        """Appends a token (rows,) to every row; returns the logits that follow."""
        self.cache.column, seen = self.end, self.column[:self.cache.width]
        mask = (seen >= self.before[:, None]) & (seen <= self.end) & (self.end - seen < self.reach)
        position = self.end - self.before
        logits = self.forward(token[:, None], position[:, None], mask[:, None, None])
        self.end += 1
        return logits

    def shape(self, t: int) -> tuple[int, int]:
        """Sets how much of the cache is seen where t tokens follow the prompts: rows, columns."""
        self.cache.width = self.pace.wide(self.P + t)
        return self.cache.rows, self.cache.width

    def keep(self, rows: Tensor) -> None:
        self.before = self.before[rows]
        self.cache.keep(rows)


class Rows:
    """What is drawn, and of the rows that are still at work, how far they are. All of it on the
    device, and changed in place."""

    def __init__(self, N: int, tokens: int, longest: int, device: torch.device):
        """N rows of so many tokens at most; `longest`: tokens of the longest stop."""
        self.ids = torch.full((N, tokens), -1, device=device)
        self.end, self.by = torch.zeros(2, N, dtype=torch.long, device=device)
        self.t = torch.zeros(1, dtype=torch.long, device=device)  # tokens drawn
        self.row, self.token = torch.arange(N, device=device), self.end.clone()
        self.last = torch.full((N, longest), -1, device=device)
        self.running = torch.ones(N, dtype=torch.bool, device=device)

    def note(self, token: Tensor, rules: "Rules") -> None:
        """Appends a token (rows,) to each running row, and notes which of them end with it."""
        row, t = self.row, self.t + 1
        self.ids[row, self.t] = token.masked_fill(~self.running, -1)
        self.last.copy_(torch.cat([self.last[:, 1:], token[:, None]], 1))
        is_eos = (token[:, None] == rules.eos).any(1)
        stop = -is_eos.long()
        for s in rules.stops:
            stop = stop.masked_fill((self.last[:, -len(s):] == s).all(1), len(s))
        ended = self.running & (self.end[row] == 0) & ((stop != 0) | (t == rules.L))
        self.end[row], self.by[row] = (
            t.where(ended, self.end[row]), stop.where(ended, self.by[row]))
        cut = (self.end[row] > 0) & ((self.by[row] == 0) | (t == self.end[row] + rules.room))
        self.running &= ~is_eos & ~cut
        self.token.copy_(token)
        self.t += 1

    def keep(self, some: Tensor) -> None:
        for name in ("row", "token", "last", "running"):
            setattr(self, name, getattr(self, name)[some])


class Rules(NamedTuple):
    """When a row ends: as `sample` says."""

    stops: list[Tensor]
    eos: Tensor
    L: int
    room: int


class Recorded:
    """A function whose work on the GPU is the same in every call of a shape: it runs the first
    time, is recorded the second, and from then on launched as a whole."""
    latest = None  # alive, for the sake of its memory: the next recording's, of any rollout

    def __init__(self, function: Callable[[], None]):
        self.function, self.shape, self.graph = function, None, None

    def __call__(self, shape: tuple) -> None:
        if shape != self.shape:
            self.shape, self.graph = shape, None
            return self.function()
        if self.graph is None:
            self.graph = Recorded.latest = record(self.function, Recorded.latest)
        self.graph.replay()


@cache
def aside() -> torch.cuda.Stream:
    """The stream of all recordings, as cuBLAS keeps a workspace for each."""
    return torch.cuda.Stream()


def record(function: Callable[[], None], before: torch.cuda.CUDAGraph | None):
    """A CUDA graph, in the memory of the one before it. By hand: torch.cuda.graph would first hand
    all unused memory back to the driver. Threads such as NCCL's may go on calling CUDA."""
    graph = torch.cuda.CUDAGraph()
    aside().wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside()):
        graph.capture_begin(before and before.pool(), capture_error_mode="thread_local")
        try:
            function()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(aside())
    return graph


@torch.no_grad()
def sample(policy, prompts: list[list[int]], stops: list[list[int]], eos: list[int], K: int, L: int,
           uniform: Tensor | None, temperature: float = 1.0,
           room: int = 0) -> list[tuple[list[int], int, int]]:
    """K continuations of each of B prompts, driven by uniform (B K, L + room); None: greedy.

    z ends with one of `stops` (token ids), at one of `eos`, or after L tokens. With room, a z that
    L did not cut goes on to its answer, until EOS or for `room` tokens. Returns for each its
    ids, the number of those that are z and what ended it, and what did: a stop of so many tokens, 0
    for L, -1 for EOS."""
    device = policy.device
    uniform = None if uniform is None else uniform.to(device)
    eos, *stops = (torch.tensor(s, device=device) for s in (eos, *stops))
    rules = Rules(stops, eos, L, room)
    rows = Rows(len(prompts) * K, L + room, max(map(len, [eos, *stops])), device)
    decoder = Decoder(policy, prompts, K, L + room)

    def draw(logits: Tensor) -> None:
        chance = None if uniform is None else uniform[rows.row, rows.t]
        rows.note(pick_tokens(logits, chance, temperature), rules)

    def step() -> None:
        draw(decoder.step(rows.token))

    advance = Recorded(step) if decoder.pace.graphs else lambda _: step()
    draw(decoder.begin())
    for t in range(1, L + room):
        if t % decoder.pace.look == 0:
            if not (left := int(rows.running.sum())):
                break
            shrink(rows, decoder, left)
        advance(decoder.shape(t))
    drawn = zip(rows.ids.tolist(), rows.end.tolist(), rows.by.tolist())
    return [([i for i in z if i >= 0], *ended) for z, *ended in drawn]


def shrink(rows: Rows, decoder: Decoder, left: int) -> None:
    """Halves the rows for as long as those `left` fit: a copy of the cache that is worth it, and
    few sizes."""
    n = len(rows.row)
    while left <= n // 2:
        n //= 2
    if n < len(rows.row):
        some = rows.running.int().argsort(descending=True, stable=True)[:n]
        rows.keep(some)
        decoder.keep(some)
