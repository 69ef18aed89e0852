"""Proves, without CUDA, that a decoding step can be captured as a CUDA graph: a tape stands for it.

The tape records every operation of a step with the tensors it was called on, and replays them. A
step that depends on a number in Python, on a newly made tensor, or on what the host reads from the
device would replay something else.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import latro
from kernels import decode
from test_latro_tree import CONFIGS, EOS, EXPERTS, PROMPTS, STOPS, continued, model

HOST_WAITS = "_local_scalar_dense", "nonzero", "unique", "masked_select", "equal"
COPIED_FROM_HOST = "scalar_tensor", "lift_fresh"


class Tape(TorchDispatchMode):
    """Like a CUDA graph, except that capturing also runs: the first replay does nothing."""

    def __init__(self, function):
        super().__init__()
        self.calls, self.replays = [], 0
        with self:
            function()

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        name = call.overloadpacket.__name__
        assert not any(other in name for other in HOST_WAITS + COPIED_FROM_HOST), (
            f"{name} involves the host")
        result = call(*args, **(kwargs or {}))
        self.calls.append((call, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        if self.replays:
            for call, args, kwargs, result in self.calls:
                repeated = call(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(repeated)):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)
        self.replays += 1


@pytest.fixture
def tapes(monkeypatch):
    """Makes the CPU decode as a GPU does, with smaller numbers. Returns the list of all tapes."""
    made = []

    def capture_graph(function, previous):
        made.append(Tape(function))
        return made[-1]
    monkeypatch.setattr(decode, "capture_graph", capture_graph)
    monkeypatch.setattr(decode.CUDAGraphRunner, "latest", None)
    monkeypatch.setitem(decode.PACES, "cpu", decode.Pace(3, 8, True))
    return made


def sample(policy, uniform, **options):
    K = len(uniform) // len(PROMPTS)
    return latro.sample_rationales(policy, PROMPTS, STOPS, EOS, K, 20, uniform, **options)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", CONFIGS)
def test_captured_steps_draw_the_same_samples(name, temperature, tapes, monkeypatch):
    """The same as step by step: ids, where each z ends and why, and the answer after it. A mixture
    of experts is not captured."""
    policy = model(name)
    uniform = torch.rand(len(PROMPTS) * 8, 26, generator=torch.Generator().manual_seed(2))
    captured = sample(policy, uniform, temperature=temperature, max_answer_tokens=6)
    assert len({len(ids) for ids, *_ in captured}) > 5
    if name in EXPERTS:
        assert not tapes
    else:
        assert tapes and sum(tape.replays for tape in tapes) > 2 * len(tapes)
    for pace in (decode.Pace(3, 8, False), decode.Pace(1, 1, False)):
        monkeypatch.setitem(decode.PACES, "cpu", pace)
        stepwise = sample(policy, uniform, temperature=temperature, max_answer_tokens=6)
        assert stepwise == captured


def test_captured_steps_decode_greedily_the_same(tapes, monkeypatch):
    policy = model("llama")

    def decode_greedily():
        return latro.sample_rationales(policy, PROMPTS, STOPS, [-1], 1, 30, None)
    captured = decode_greedily()
    monkeypatch.setitem(decode.PACES, "cpu", decode.Pace(1, 1, False))
    assert tapes and decode_greedily() == captured


def test_the_number_of_captures_is_small(tapes):
    """One for each number of rows and of columns, where rows end at 1, 2, ..., 64 tokens."""
    first = torch.arange(100 - 64, 100).repeat(4).tolist()
    continued(first, 70, 0, [], [99])
    assert len(tapes) <= 64 // 8 + 8


def test_unwritten_columns_have_no_effect(tapes, monkeypatch):
    """Columns of the cache that are not written yet are zeros: 0 x NaN would be NaN."""
    new_empty = torch.Tensor.new_empty
    uniform = torch.rand(len(PROMPTS), 20, generator=torch.Generator().manual_seed(2))
    policy, expected = model("llama"), sample(model("llama"), uniform)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *size, **options: new_empty(
        *size, **options).fill_(torch.nan))
    assert sample(policy, uniform) == expected
