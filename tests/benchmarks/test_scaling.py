"""Proves that the candidates of `python -m benchmarks scaling` compute the same gradient, and that
the memory it measures is that of the update."""

import json

import pytest
import torch
import torch.distributed as dist

from benchmarks import __main__ as command
from benchmarks import scaling
from benchmarks.work import Ours, Workload
from harness import distributed

SIZES = dict(K=3, L=12, prompt=9, V=64)


@pytest.fixture
def work():
    distributed.init_distributed()
    args = scaling.SimpleNamespace(questions=2, K=3, L=12)
    yield Workload("toy", args, True, dict(vocab_size=64), (9, 9))
    dist.destroy_process_group()


def test_padded_rows_have_our_gradient(work):
    assert {len(example.x) for example in work.batch} == {9} and work.policy.vocab_size == 64
    work.lengths = [12, 5, 3, 4, 12, 7]  # L cuts one of each question, EOS ends the others
    exact, padded = (of(work).gradient_to_compare() for of in (Ours, scaling.Padded))
    for a, b in zip(padded, exact):
        assert float((a - b).norm() / b.norm()) < 1e-4


def test_extra_bytes_are_those_of_the_update(monkeypatch):
    """A loop that takes 80 MB more and lets them go shows in the peak, what lay there before does
    not."""
    class Greedy(Ours):
        def run(self, use_uniform):
            torch.ones(20_000_000)
            return super().run(use_uniform)
    kept = torch.ones(20_000_000)
    monkeypatch.setitem(scaling.CANDIDATES, "greedy", Greedy)
    plain, greedy = (scaling.measure_update(name, SIZES, 1) for name in ("ours", "greedy"))
    assert plain["extra_bytes"] < 40e6 and 60e6 < greedy["extra_bytes"] < 160e6
    assert greedy["seconds"] == pytest.approx(sum(greedy["phases"].values())) and len(kept)


@pytest.mark.slow
def test_command(tmp_path, monkeypatch):
    """Every point in a process of its own; a point that fails has a note, and the others remain."""
    monkeypatch.setattr(scaling, "BASE", SIZES)
    monkeypatch.setattr(scaling, "AXES", dict(K=(2,), V=(0,)))
    monkeypatch.setattr(scaling, "PROCESSES", (2,))
    code = command.main(["scaling", "--only", "ours", "padded", "--rounds", "1",
                         "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert code == 0 and [(r["axis"], r["value"], r["candidate"]) for r in rows] == [
        *((axis, value, name) for axis, values in scaling.AXES.items() for value in values
          for name in ("ours", "padded")), ("processes", 2, "ours")]
    assert [r["value"] for r in rows if "note" in r] == [0, 0]
    assert all(r["seconds"] > 0 for r in rows if "note" not in r)
    table = (tmp_path / "scaling.md").read_text()
    assert "| K 2 |" in table and "processes 2" in table
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


@pytest.mark.gpu
def test_on_a_gpu(tmp_path, monkeypatch):
    """Seconds, and the bytes of the device that an update takes. Not on several processes."""
    monkeypatch.setattr(scaling, "BASE", SIZES)
    monkeypatch.setattr(scaling, "AXES", dict(K=(2,)))
    code = command.main(["scaling", "--only", "ours", "--rounds", "1", "--out", str(tmp_path)])
    [row] = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert code == 0 and row["seconds"] > 0 and row["extra_bytes"] > 0
