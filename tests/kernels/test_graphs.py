"""Proves, without CUDA, that a decoding step can be captured as a CUDA graph: a tape stands for it.

The tape records every operation of a step with the tensors it was called on, and replays them. A
step that depends on a number in Python, on a newly made tensor, or on what the host reads from the
device would replay something else."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import latro
from kernels import decode
from test_latro_tree import CONFIGS, EOS, PROMPTS, STOPS, continued, model

WAITS = "_local_scalar_dense", "nonzero", "unique", "masked_select", "equal"  # the host for it
MADE = "scalar_tensor", "lift_fresh"  # on the host, and copied


class Tape(TorchDispatchMode):
    """Like a CUDA graph, except that capturing also runs: the first replay does nothing."""

    def __init__(self, function):
        super().__init__()
        self.calls, self.played = [], 0
        with self:
            function()

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        name = call.overloadpacket.__name__
        assert not any(other in name for other in WAITS + MADE), f"{name} involves the host"
        made = call(*args, **(kwargs or {}))
        self.calls.append((call, args, kwargs or {}, made))
        return made

    @torch.no_grad()
    def replay(self):
        if self.played:
            for call, args, kwargs, made in self.calls:
                again = call(*args, **kwargs)
                for old, new in zip(tree_leaves(made), tree_leaves(again)):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)
        self.played += 1


@pytest.fixture
def tapes(monkeypatch):
    """Sampling at a GPU's pace, in small. Returns the list of all tapes that it makes."""
    made = []

    def record(function, before):
        made.append(Tape(function))
        return made[-1]
    monkeypatch.setattr(decode, "capture_graph", record)
    monkeypatch.setattr(decode.CUDAGraphRunner, "latest", None)
    monkeypatch.setitem(decode.PACES, "cpu", decode.Pace(3, 8, True))
    return made


def drawn(policy, uniform, **how):
    K = len(uniform) // len(PROMPTS)
    return latro.sample_rationales(policy, PROMPTS, STOPS, EOS, K, 20, uniform, **how)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", CONFIGS)
def test_captured_equals_step_by_step(name, temperature, tapes, monkeypatch):
    """The same samples, each with its end and with an answer after it."""
    policy = model(name)
    uniform = torch.rand(len(PROMPTS) * 8, 26, generator=torch.Generator().manual_seed(2))
    recorded = drawn(policy, uniform, temperature=temperature, max_answer_tokens=6)
    assert len({len(ids) for ids, *_ in recorded}) > 5
    assert tapes and sum(tape.played for tape in tapes) > 2 * len(tapes)
    for pace in (decode.Pace(3, 8, False), decode.Pace(1, 1, False)):
        monkeypatch.setitem(decode.PACES, "cpu", pace)
        again = drawn(policy, uniform, temperature=temperature, max_answer_tokens=6)
        assert again == recorded


def test_captured_greedily(tapes, monkeypatch):
    policy = model("llama")

    def sample():
        return latro.sample_rationales(policy, PROMPTS, STOPS, [-1], 1, 30, None)
    recorded = sample()
    monkeypatch.setitem(decode.PACES, "cpu", decode.Pace(1, 1, False))
    assert tapes and sample() == recorded


def test_few_captures(tapes):
    """One for each number of rows and of columns: rows end at 1, 2, ..., 64 tokens."""
    first = torch.arange(100 - 64, 100).repeat(4).tolist()
    continued(first, 70, 0, [], [99])
    assert len(tapes) <= 64 // 8 + 8


def test_unwritten_columns_have_no_effect(tapes, monkeypatch):
    """Columns of the cache that are not written yet are zeros: 0 x NaN would be NaN."""
    empty = torch.Tensor.new_empty
    uniform = torch.rand(len(PROMPTS), 20, generator=torch.Generator().manual_seed(2))
    policy, ids = model("llama"), drawn(model("llama"), uniform)
    monkeypatch.setattr(torch.Tensor, "new_empty",
                        lambda *size, **how: empty(*size, **how).fill_(torch.nan))
    assert drawn(policy, uniform) == ids
