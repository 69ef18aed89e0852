"""The same job on CUDA: bfloat16 under FSDP2, NCCL. Nothing here runs without a GPU."""

import math

import pytest
from transformers import AutoModelForCausalLM

from conftest import TINY, launch, rows, start

pytestmark = pytest.mark.gpu


def test_toy_trains(tmp_path):
    """KL is exactly 0 at first: policy and reference differ in dtype, but both compute in bf16."""
    out = start(*TINY, "--steps", 4, "--checkpointing", out=tmp_path / "out")
    metrics = rows(out)
    assert metrics[0]["kl"] == 0.0 and all(math.isfinite(row["elbo"]) for row in metrics)
    AutoModelForCausalLM.from_pretrained(out)


def test_resume(tmp_path):
    """From the middle on, the run that was stopped is the run that was not, within bf16's noise."""
    whole = rows(start(*TINY, "--steps", 4, "--save-every", 2, out=tmp_path / "whole"))
    out = start(*TINY, "--steps", 4, "--save-every", 2, out=tmp_path / "out", stop=2)
    resumed = rows(start("--resume", out=out))
    assert [r["step"] for r in resumed] == [r["step"] for r in whole]
    assert abs(resumed[2]["logp_y"] - whole[2]["logp_y"]) < 0.1


def test_from_the_shell(tmp_path):
    done = launch(*TINY, "--steps", 1, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "held-out questions" in done.stdout
