"""Proves that a run directory of an earlier version still resumes and is still graded.

tests/old_run holds a tiny model, its data, a run that commit cf05fda stopped after 2 of 4 updates,
and the metrics of the same run without a stop (torch 2.13.0, one CPU thread).
"""

import json
import shutil

import pytest

import latro  # noqa: F401  before transformers: see kernels/__init__.py
import eval as grading
from conftest import ROOT, rows, start


@pytest.fixture
def old_run(tmp_path, monkeypatch):
    """A copy, in a directory from which its relative paths are right."""
    folder = shutil.copytree(ROOT / "tests" / "old_run", tmp_path / "old_run")
    monkeypatch.chdir(folder)
    return folder


def test_resumes(old_run, monkeypatch):
    """Its questions came in the order of another random stream, which is put back here."""
    monkeypatch.setattr(latro, "ORDER", 0)
    start("--resume", out="run")
    expected = [json.loads(line) for line in (old_run / "expected.jsonl").read_text().splitlines()]
    found = rows("run")
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    for ours, theirs in zip(found, expected, strict=True):
        assert set(theirs) <= set(ours)
        for key in ("elbo", "logp_y", "kl", "reward", "z_len", "finished", "grad_norm", "lr"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), key


def test_is_graded(old_run, capsys):
    assert grading.main("--ckpt run --k 2".split()) == 0
    assert "run - base, greedy" in capsys.readouterr().out
    held = json.loads((old_run / "run" / "eval" / "eval.json").read_text())
    assert held["models"] == dict(base="model", run="run") and len(held["rows"]["run"]) == 3
