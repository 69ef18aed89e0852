"""Proves, without CUDA, that a decoding step can be captured as a CUDA graph: a tape stands for it.

The tape records every operation of a step with the tensors it was called on, and replays them. A
step that depends on a number in Python, on a newly made tensor, or on what the host reads from the
device would replay something else.
"""

import math
from functools import partial

import pytest
import torch

import latro
from kernels import decode
from pretended_cuda import Tape, stub_torch_cuda
from test_latro_tree import CONFIGS, EOS, EXPERTS, PROMPTS, STOPS, continued, model


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
    """The same as step by step: ids, where each z ends and why, and the answer after it. Some rows
    are greedy. A mixture of experts is not captured."""
    policy = model(name)
    uniform = torch.rand(len(PROMPTS) * 8, 26, generator=torch.Generator().manual_seed(2))
    uniform[::5] = math.nan
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


# ------------------------------------------------------------------------------ out of memory
@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda, pretended. Returns the list of the calls of empty_cache."""
    emptied = []
    stub_torch_cuda(partial(monkeypatch.setattr, raising=False))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    decode.capture_stream.cache_clear()
    yield emptied
    decode.capture_stream.cache_clear()


def failing(error, times):
    """A function that adds 1 to a number. Its first `times` calls raise in the middle."""
    number, calls = torch.zeros(1), []

    def function():
        calls.append(True)
        number.add_(1)
        if len(calls) <= times:
            raise error
    return function, number, calls


def test_a_capture_that_runs_out_of_memory_is_repeated(cuda):
    """Once, after unused memory has been returned. The second capture is replayed."""
    function, number, calls = failing(torch.OutOfMemoryError("CUDA out of memory"), 1)
    graph = decode.capture_graph(function, None)
    assert len(calls) == 2 and cuda == [True]
    before = float(number)
    for _ in range(3):
        graph.replay()
    assert float(number) == before + 2  # capturing a tape also runs: the first replay does nothing


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), KeyError("x")])
def test_an_error_inside_a_capture_is_raised_as_it_is(cuda, error):
    """The end of the broken capture fails too. That error would hide what `timed` looks for."""
    function, _, calls = failing(error, 2)
    with pytest.raises(type(error)) as caught:
        decode.capture_graph(function, None)
    assert caught.value is error and len(calls) == (1 if isinstance(error, KeyError) else 2)
    assert not torch.cuda.is_current_stream_capturing()
    assert torch.cuda.current_stream() is torch.cuda.default_stream()


def test_captures_share_a_pool_and_are_not_on_the_default_stream(cuda):
    first = decode.capture_graph(lambda: None, None)
    second = decode.capture_graph(lambda: None, first)
    assert first.pool() == second.pool()
    with pytest.raises(RuntimeError, match="non-default stream"):
        torch.cuda.CUDAGraph().capture_begin()
