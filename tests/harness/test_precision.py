"""A GPU's precision on a CPU: float32 weights under FSDP2 that compute in bfloat16, beside a
reference that is bfloat16 throughout. `compute_dtype` is all that is changed."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import TINY, TOY, contents, gradients, launch, rows, start, untimed

import kernels  # after conftest, which knows where it is: this file is also a script
import latro


def half(device):
    return torch.bfloat16


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(latro, "compute_dtype", half)
    yield
    kernels.use("auto")


@pytest.mark.parametrize("temperature", [1.0, 0.9])
def test_kl_is_zero_before_the_first_update(temperature, tmp_path):
    """To the last bit: policy and reference see the same numbers. FSDP2 would round what a forward
    pass is given, temperatures among it, to bfloat16. Released-code defect 8: not 0 at first."""
    flags = [*TINY, "--steps", 2, "--temperature", temperature]
    first, second = rows(start(*flags, out=tmp_path / "out"))
    assert first["kl"] == 0.0 and second["kl"] > 0.0


def test_what_is_float32(tmp_path, monkeypatch):
    """Weights, gradients and Adam's moments. A step of lr 5e-7 is below bfloat16's resolution: as
    bfloat16, nearly no weight would have moved."""
    seen, update = set(), latro.optimizer_step

    def looking(policy, optimizer, step, args):
        assert any(isinstance(m, torch.distributed.fsdp.FSDPModule) for m in policy.modules())
        seen.update((p.dtype, p.grad.dtype) for p in policy.parameters())
        made = update(policy, optimizer, step, args)
        seen.update(t.dtype for state in optimizer.state.values() for t in state.values())
        return made
    monkeypatch.setattr(latro, "update", looking)
    out = start(*TINY, "--steps", 1, "--lr", 5e-7, out=tmp_path / "out")
    assert seen == {(torch.float32, torch.float32), torch.float32}
    before, after = (load_file(folder / "model.safetensors") for folder in (TOY, out))
    moved = torch.cat([(after[name] != w).flatten() for name, w in before.items()])
    rounded = torch.cat([(after[name].bfloat16() != w.bfloat16()).flatten()
                         for name, w in before.items()])
    assert moved.float().mean() > 0.9 and rounded.float().mean() < 0.01


def test_gradient_is_that_of_float32_but_for_rounding(tmp_path, monkeypatch):
    found, update = [], latro.optimizer_step

    def looking(policy, *rest):
        found.append(torch.cat([g.flatten() for g in gradients(policy)]))
        return update(policy, *rest)
    monkeypatch.setattr(latro, "update", looking)
    flags = [*TINY, "--steps", 1, "--objective", "sft"]  # no samples, which would not be the same
    start(*flags, out=tmp_path / "half")
    monkeypatch.setattr(latro, "compute_dtype", lambda device: torch.float32)
    start(*flags, out=tmp_path / "whole")
    ours, right = found
    assert 0.001 < (ours - right).norm() / right.norm() < 0.06  # bfloat16 has 8 bits


def test_resume_is_bit_equal(tmp_path):
    flags = [*TINY, "--steps", 4, "--save-every", 2]
    whole = start(*flags, out=tmp_path / "whole")
    out = start("--resume", out=start(*flags, out=tmp_path / "out", stop=2))
    assert untimed(rows(out)) == untimed(rows(whole))
    for path in map(Path, ("model.safetensors", "state/step-000004/__0_0.distcp")):
        assert contents(out)[path] == contents(whole)[path]


def test_kernels_do_the_same(tmp_path, monkeypatch):
    """Triton's, interpreted, in the whole loop: log-probs as torch's from the same bfloat16 hidden
    states, gradients within the one rounding more."""
    pytest.importorskip("triton")
    flags = [*TINY, *"--L 8 --steps 2 --checkpointing --kernels".split()]
    right = rows(start(*flags, "torch", out=tmp_path / "torch"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    ours = rows(start(*flags, "triton", out=tmp_path / "triton"))
    assert ours[0]["kl"] == 0.0
    assert ours[0]["logp_y"] == pytest.approx(right[0]["logp_y"], rel=1e-5)
    assert ours[0]["grad_norm"] == pytest.approx(right[0]["grad_norm"], rel=0.02)
    assert untimed(ours)[0] != untimed(right)[0]  # it was another way to compute them


def test_two_processes(tmp_path):
    code, _, errors = launch(*TINY, "--steps", 2, "--temperature", 0.9, "--out", tmp_path / "out",
                             processes=2, script=__file__)
    assert code == 0, errors[-3000:]
    first, second = rows(tmp_path / "out")
    assert first["kl"] == 0.0 and second["kl"] > 0.0


if __name__ == "__main__":
    distributed.compute_dtype = half
    sys.exit(latro.main(sys.argv[1:]))
