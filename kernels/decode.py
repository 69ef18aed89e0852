"""Decoding with any Hugging Face model: each prompt computed once, finished rows dropped.

A step does the same work on the same tensors each time and never waits for the host. On a GPU it is
captured as a CUDA graph and replayed for as long as the number of rows and the visible width of the
cache stay the same.

latro.sample_rationales is the loop that uses it. Rows: B prompts times K samples, prompt 0 first.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from inspect import signature
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import PAD_POSITION, Masks, additive_masks, causal_masks, windows


class Pace(NamedTuple):
    """How a kind of device decodes."""

    stop_check_every: int  # tokens between the host's checks of how many rows are still running
    cache_multiple: int  # the visible width of the cache is rounded up to it
    cuda_graphs: bool  # whether steps are captured

    def round_up(self, tokens: int) -> int:
        """The width of a cache for so many tokens."""
        return -(-tokens // self.cache_multiple) * self.cache_multiple


PACES = dict(cpu=Pace(1, 1, False), cuda=Pace(16, 128, True))


def pace_of(policy) -> Pace:
    """The pace of a policy's device. A mixture of experts may wait for the host to learn which
    experts its tokens need, which no CUDA graph allows."""
    pace, config = PACES[policy.device.type], policy.config
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    return pace._replace(cuda_graphs=False) if experts else pace


class KVCache:
    """All that transformers' layers ask of a cache when masks and positions are given.

    One buffer of keys and one of values per layer, allocated once. While `rows` is None it holds
    the prompts' own keys and values."""

    def __init__(self):
        self.layers, self.rows = {}, None

    def update(self, k: Tensor, v: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        if self.rows is None:
            self.layers[layer] = k, v
            return k, v
        for buffer, new in zip(self.layers[layer], (k, v)):
            buffer[:self.rows].index_copy_(2, self.column, new)
        return tuple(buffer[:self.rows, :, :self.width] for buffer in self.layers[layer])

    def expand_kv(self, K: int, width: int) -> None:
        """Replaces each prompt's keys and values by K rows of `width` columns. They start as zeros:
        a masked column has weight 0, and 0 times NaN would be NaN."""
        for layer, kv in self.layers.items():
            self.layers[layer] = [t.new_zeros(len(t) * K, t.shape[1], width, t.shape[3])
                                  for t in kv]
            for buffer, t in zip(self.layers[layer], kv):
                buffer.unflatten(0, (-1, K))[..., :t.shape[2], :] = t[:, None]
            self.rows, self.width = len(buffer), t.shape[2]

    def select_rows(self, rows: Tensor) -> None:
        """Moves the visible part of some rows to the front. Copies half a layer at a time."""
        self.rows = len(rows)
        for buffer in (buffer for kv in self.layers.values() for buffer in kv):
            buffer[:len(rows), :, :self.width] = buffer[rows, :, :self.width]


class Decoder:
    """K continuations of each of B prompts, a token at a time."""

    def __init__(self, policy, prompts: list[list[int]], K: int, max_new_tokens: int):
        self.policy, self.prompts, self.K = policy, prompts, K
        self.max_new_tokens, device = max_new_tokens, policy.device
        self.cache, self.P = KVCache(), max(map(len, prompts))
        self.pace = pace_of(policy)
        self.padding = torch.tensor([self.P - len(p) for p in prompts], device=device)
        self.column = torch.arange(self.P + max_new_tokens + self.pace.cache_multiple,
                                   device=device)
        self.end = torch.tensor([self.P], device=device)  # the column of the next token
        # From transformers 5.24 on, models call it `cache`.
        parameters = signature(policy.model.forward).parameters
        self.cache_name = "cache" if "cache" in parameters else "past_key_values"

    def prefill(self) -> Tensor:
        """Reads each prompt once, padded on the left. Returns the (B K, V) logits of the first
        token of each row."""
        ids = [[0] * (self.P - len(p)) + p for p in self.prompts]
        position = self.column[:self.P] - self.padding[:, None]
        masked = position.where(position >= 0, PAD_POSITION)
        logits = self.forward(torch.tensor(ids, device=position.device), position.clamp(min=0),
                              causal_masks(masked, masked, self.policy.config))
        self.cache.expand_kv(self.K, self.pace.round_up(self.P + self.max_new_tokens))
        self.padding = self.padding.repeat_interleave(self.K)
        return logits.repeat_interleave(self.K, 0)

    def forward(self, ids: Tensor, position: Tensor, allowed: Masks) -> Tensor:
        """(rows, V) logits of the next token, before any divisor. The head's product is accumulated
        and kept in float32."""
        W = self.policy.get_output_embeddings().weight
        masks = additive_masks(allowed, W, self.policy.config)
        some, *_ = masks.values()  # transformers makes none of its own
        h = self.policy.model(ids, position_ids=position, attention_mask=some, masks=masks,
                              use_cache=True, **{self.cache_name: self.cache}
                              ).last_hidden_state[:, -1]
        if h.is_cuda and h.dtype != torch.float32:
            return torch.mm(h, W.T, out_dtype=torch.float32)
        return h.float() @ W.float().T

    def decode_step(self, token: Tensor) -> Tensor:
        """Appends a token (rows,) to every row. Returns the (rows, V) logits of the next one."""
        self.cache.column, column = self.end, self.column[:self.cache.width]
        visible = (column >= self.padding[:, None]) & (column <= self.end)  # (rows, width)
        allowed = {window: (visible & (self.end - column < window) if window else visible)
                   [:, None, None] for window in windows(self.policy.config)}
        position = self.end - self.padding
        logits = self.forward(token[:, None], position[:, None], allowed)
        self.end += 1
        return logits

    def set_length(self, tokens: int) -> tuple[int, int]:
        """Makes the cache visible up to so many tokens after the prompts. Returns (rows, width),
        which change seldom: a captured step is valid while they stay the same."""
        self.cache.width = self.pace.round_up(self.P + tokens)
        return self.cache.rows, self.cache.width

    def select_rows(self, rows: Tensor) -> None:
        self.padding = self.padding[rows]
        self.cache.select_rows(rows)


class DecodeState:
    """What has been drawn, and how far each row that still decodes has got. All of it is on the
    device and changed in place."""

    def __init__(self, N: int, max_tokens: int, device: torch.device):
        """N rows of at most `max_tokens` tokens."""
        self.ids = torch.full((N, max_tokens), -1, device=device)
        # Tokens of z and of what ended it, and what that was; 0 while z goes on.
        self.end, self.stop_reason = torch.zeros(2, N, dtype=torch.long, device=device)
        self.drawn = torch.zeros(1, dtype=torch.long, device=device)  # tokens drawn so far
        # Of the rows that still decode: which they are, their last token, how many characters of
        # the template they end with, how many tokens spell those, and whether they are running.
        self.row, self.token = torch.arange(N, device=device), self.end.clone()
        self.matched, self.template_tokens = self.end.clone(), self.end.clone()
        self.running = torch.ones(N, dtype=torch.bool, device=device)

    def append(self, token: Tensor) -> None:
        """Writes a token (rows,) to each running row."""
        self.ids[self.row, self.drawn] = token.masked_fill(~self.running, -1)
        self.token.copy_(token)
        self.drawn += 1

    def select_rows(self, rows: Tensor) -> None:
        for name in ("row", "token", "matched", "template_tokens", "running"):
            setattr(self, name, getattr(self, name)[rows])


def compact(state: DecodeState, decoder: Decoder, running: int) -> None:
    """Halves the rows for as long as the running ones fit. Halving makes each copy of the cache
    worth its cost, and keeps the number of shapes, and so of captures, small."""
    n = len(state.row)
    while running <= n // 2:
        n //= 2
    if n < len(state.row):
        rows = state.running.int().argsort(descending=True, stable=True)[:n]
        state.select_rows(rows)
        decoder.select_rows(rows)


class CUDAGraphRunner:
    """Runs a function whose work on the GPU is the same in every call of a shape: eagerly the first
    time, captured the second, and replayed from then on."""
    latest = None  # the last capture of any rollout, kept alive: the next one reuses its memory

    def __init__(self, function: Callable[[], None]):
        self.function, self.shape, self.graph = function, None, None

    def __call__(self, shape: tuple) -> None:
        if shape != self.shape:
            self.shape, self.graph = shape, None
            self.function()
            return
        if self.graph is None:
            self.graph = capture_graph(self.function, CUDAGraphRunner.latest)
            CUDAGraphRunner.latest = self.graph
        self.graph.replay()


@cache
def capture_stream() -> torch.cuda.Stream:
    """The one stream of all captures: cuBLAS keeps a workspace for each stream."""
    return torch.cuda.Stream()


def capture_graph(function: Callable[[], None], previous: torch.cuda.CUDAGraph | None):
    """Captures a CUDA graph in the memory pool of the previous one.

    During a capture, torch cannot return unused memory to the driver to make room. If memory runs
    out, that is done here, and the capture is tried once more."""
    try:
        return record_graph(function, previous)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
    return record_graph(function, previous)


def record_graph(function: Callable[[], None], previous: torch.cuda.CUDAGraph | None):
    """One attempt of capture_graph. An error inside the function is raised as it is.

    By hand, because torch.cuda.graph would first return all unused memory to the driver. Other
    threads, such as NCCL's, may go on calling CUDA."""
    graph = torch.cuda.CUDAGraph()
    capture_stream().wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(capture_stream()):
        graph.capture_begin(previous and previous.pool(), capture_error_mode="thread_local")
        try:
            function()
        except BaseException:
            with suppress(RuntimeError):  # a broken capture fails here too, and says less
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(capture_stream())
    return graph
