"""What a CUDA graph asks of a decoding step, without CUDA: a tape takes its place.

The tape notes every operation of a step with the very tensors it was called on, and plays them
again: a step that hung on a number in Python, on a tensor made anew, or on what the host reads from
the device would play something else."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from kernels import sampler
from test_tree import CONFIGS, EOS, PROMPTS, STOPS, model, told

WAITS = "_local_scalar_dense", "nonzero", "unique", "masked_select", "equal"  # the host for it
MADE = "scalar_tensor", "lift_fresh"  # on the host, and copied


class Tape(TorchDispatchMode):
    """Looks like a CUDA graph, but that what is recorded is also run: the first replay is it."""

    def __init__(self, function):
        super().__init__()
        self.calls, self.played = [], 0
        with self:
            function()

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        name = call.overloadpacket.__name__
        assert not any(other in name for other in WAITS + MADE), f"the host has to do with {name}"
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
    """Sampling at a GPU's pace, in small: all tapes that it makes."""
    made = []

    def record(function, before):
        made.append(Tape(function))
        return made[-1]
    monkeypatch.setattr(sampler, "record", record)
    monkeypatch.setattr(decode.CUDAGraphRunner, "latest", None)
    monkeypatch.setitem(decode.PACES, "cpu", decode.Pace(look=3, columns=8, graphs=True))
    return made


def drawn(policy, uniform, **how):
    K = len(uniform) // len(PROMPTS)
    return latro.sample_rationales(policy, PROMPTS, STOPS, EOS, K, 20, uniform, **how)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", CONFIGS)
def test_recorded_is_not_recorded(name, temperature, tapes, monkeypatch):
    """The same samples step by step, each with its end and with an answer behind it."""
    policy = model(name)
    uniform = torch.rand(len(PROMPTS) * 8, 26, generator=torch.Generator().manual_seed(2))
    recorded = drawn(policy, uniform, temperature=temperature, room=6)
    assert len({len(ids) for ids, *_ in recorded}) > 5
    assert tapes and sum(tape.played for tape in tapes) > 2 * len(tapes)
    for pace in (decode.Pace(3, 8, False), decode.Pace(1, 1, False)):
        monkeypatch.setitem(decode.PACES, "cpu", pace)
        assert drawn(policy, uniform, temperature=temperature, room=6) == recorded


def test_recorded_greedily(tapes, monkeypatch):
    policy = model("llama")
    sample = lambda: latro.sample_rationales(policy, PROMPTS, STOPS, [-1], 1, 30, None)
    recorded = sample()
    monkeypatch.setitem(decode.PACES, "cpu", decode.Pace(1, 1, False))
    assert tapes and sample() == recorded


def test_few_recordings(tapes):
    """One for each number of rows and of columns: rows end at 1, 2, ..., 64 tokens."""
    first = torch.arange(100 - 64, 100).repeat(4).tolist()
    told(first, 70, 0, [], [99])
    assert len(tapes) <= 64 // 8 + 8


def test_what_nobody_sees_may_be_anything(tapes, monkeypatch):
    """Columns that are not written yet are made of zeros: 0 x NaN would be NaN."""
    empty = torch.Tensor.new_empty
    uniform = torch.rand(len(PROMPTS), 20, generator=torch.Generator().manual_seed(2))
    policy, ids = model("llama"), drawn(model("llama"), uniform)
    monkeypatch.setattr(torch.Tensor, "new_empty",
                        lambda *size, **how: empty(*size, **how).fill_(torch.nan))
    assert drawn(policy, uniform) == ids
