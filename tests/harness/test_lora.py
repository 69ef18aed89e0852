"""Proves that LoRA trains adapters as a naive computation would, on a frozen model that is pi_0."""

import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import TINY, TOY, launch, rows, start, untimed
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import latro
from harness import distributed, equivalence
from harness.distributed import compute_dtype, init_distributed
from harness.lora import adapters_off, merge

peft = pytest.importorskip("peft")
LORA = [*TINY, *"--lora-rank 4 --lora-alpha 12 --lr 1e-2 --steps 4 --save-every 2".split()]
PROMPTS = [[5, 6, 7, 8, 9], [12, 10]]
BRANCHES = [[[20, 21, 22], [30]], [[9, 8, 7, 6], [40, 41]]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Four updates without a break."""
    return start(*LORA, out=tmp_path_factory.mktemp("whole") / "out")


@pytest.fixture
def policy():
    """The toy with adapters of rank 4, whose B is not 0."""
    args = latro.parse([*LORA])
    policy = latro.load(args, init_distributed(), compute_dtype(torch.device("cpu")))
    torch.manual_seed(0)
    for name, p in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, 0, 0.2)
    yield policy
    torch.distributed.destroy_process_group()


def one_by_one(model, prompts=PROMPTS, branches=BRANCHES):
    """Log-probs of each branch by a plain forward pass over its sequence, in one vector."""
    parts = []
    for prompt, group in zip(prompts, branches):
        for branch in group:
            logp = model(torch.tensor([prompt + branch])).logits[0, len(prompt) - 1:-1]
            parts.append(logp.log_softmax(-1)[torch.arange(len(branch)), branch])
    return torch.cat(parts)


def naive(policy) -> torch.nn.Module:
    """The shipped toy in which W is W + alpha / R B A, with A and B to differentiate: no peft."""
    model = AutoModelForCausalLM.from_pretrained(TOY, dtype=torch.float32)
    weights = policy.state_dict()
    for name, module in [*model.named_modules()]:
        if f"{name}.base_layer.weight" not in weights:
            continue
        module.A, module.B = (torch.nn.Parameter(weights[f"{name}.lora_{part}.default.weight"]
                                                 .clone()) for part in "AB")
        module.forward = lambda x, m=module: x @ (m.weight + 3 * m.B @ m.A).T  # 12 / 4
    return model


def test_gradients_are_those_of_single_sequences(policy):
    """And only adapters have gradients."""
    weights = torch.linspace(-1, 2, sum(len(b) for group in BRANCHES for b in group))
    logp, other = policy.logprobs(latro.pack_branches(PROMPTS, BRANCHES, policy)), naive(policy)
    assert (logp - one_by_one(other)).abs().max() < 1e-5
    (weights * logp).sum().backward()
    (weights * one_by_one(other)).sum().backward()
    found = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert found and all("lora_" in name for name in found)
    for name, gradient in found.items():
        layer, part = name.split(".lora_")
        wanted = getattr(other.get_submodule(layer), part[0]).grad
        assert (gradient - wanted).norm() < 1e-5 * wanted.norm(), name


def test_without_adapters_it_is_the_base(policy):
    base = AutoModelForCausalLM.from_pretrained(TOY, dtype=torch.float32)
    tree = latro.pack_branches(PROMPTS, BRANCHES, policy)
    with torch.no_grad():
        trained = policy.logprobs(tree)
        with adapters_off(policy):
            frozen = policy.logprobs(tree)
        assert torch.equal(policy.logprobs(tree), trained)
        assert (frozen - one_by_one(base)).abs().max() < 1e-5 < (trained - frozen).abs().max()


def test_merged_weights_give_the_same_logits(policy):
    model = AutoModelForCausalLM.from_pretrained(TOY, dtype=torch.float32)
    model.load_state_dict(merge(policy.state_dict(), 3.0))
    tree = latro.pack_branches(PROMPTS, BRANCHES, policy)
    with torch.no_grad():
        assert (policy.logprobs(tree) - one_by_one(model)).abs().max() < 1e-5


def test_kl_is_exactly_0_before_the_first_update(whole):
    metrics = rows(whole)
    assert metrics[0]["kl"] == 0.0 != metrics[1]["kl"]


def test_out_is_merged_and_the_adapter_loads(whole):
    """out/ is an ordinary model, out/adapter peft's: both give the same logits, and not the base's.
    The frozen weights have not changed."""
    base = AutoModelForCausalLM.from_pretrained(TOY)
    merged = AutoModelForCausalLM.from_pretrained(whole)
    ids = torch.tensor([PROMPTS[0] + BRANCHES[0][0]])
    with torch.no_grad():
        before, ours = base(ids).logits, merged(ids).logits
        theirs = peft.PeftModel.from_pretrained(base, whole / "adapter")(ids).logits
    assert (ours - theirs).abs().max() < 1e-4 < 1e-2 < (ours - before).abs().max()
    assert merged.dtype == AutoModelForCausalLM.from_pretrained(TOY).dtype
    plain, trained = load_file(TOY / "model.safetensors"), load_file(whole / "model.safetensors")
    assert {name for name in plain if torch.equal(plain[name], trained[name])} == {
        name for name in plain if "proj" not in name}


def test_a_state_holds_adapters_only(whole):
    """Not even the embedding, which as the output head has a second name."""
    state = dcp.FileSystemReader(whole / "state/step-000004").read_metadata().state_dict_metadata
    tensors = [name for name in state if not name.startswith("optimizer.param_groups.")]
    assert tensors and all(".lora_" in name for name in tensors)


def test_resume_is_bit_equal(whole, tmp_path):
    out = start(*LORA, out=tmp_path / "out", stop=2)
    start("--resume", out=out)
    assert untimed(rows(out)) == untimed(rows(whole)) and len(rows(out)) == 4
    assert rows(out, "evals") == rows(whole, "evals")
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert load_file(out / name).keys() == load_file(whole / name).keys()
        for key, weight in load_file(out / name).items():
            assert torch.equal(weight, load_file(whole / name)[key])


@pytest.mark.slow
def test_two_processes_give_the_same_run(whole, tmp_path):
    code, _, errors = launch(*LORA, "--out", tmp_path / "out", processes=2)
    assert code == 0, errors[-2000:]
    for ours, theirs in zip(rows(tmp_path / "out"), rows(whole), strict=True):
        for key in ("reward", "kl", "grad_norm", "logp_y"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-4), key
    ours, theirs = (load_file(out / "model.safetensors") for out in (tmp_path / "out", whole))
    assert all((ours[k] - theirs[k]).abs().max() < 1e-4 for k in theirs)


def test_in_a_gpus_precision(tmp_path, monkeypatch):
    """The frozen model is bfloat16 and held once, without FSDP; adapters and gradients are float32.
    The KL is exactly 0 at first, and a run goes on bit for bit."""
    seen, step = [], latro.optimizer_step

    def look(policy, *rest):
        seen.extend((name, p.dtype, p.grad is not None and p.grad.dtype, hasattr(p, "full_tensor"))
                    for name, p in policy.named_parameters())
        return step(policy, *rest)
    monkeypatch.setattr(latro, "optimizer_step", look)
    for module in (latro, distributed, equivalence):
        monkeypatch.setattr(module, "compute_dtype", lambda device: torch.bfloat16)
    whole = start(*LORA, out=tmp_path / "whole")
    for name, dtype, gradient, by_fsdp in seen:
        adapter = "lora_" in name
        assert dtype == (torch.float32 if adapter else torch.bfloat16), name
        assert gradient == (torch.float32 if adapter else False) and by_fsdp == adapter, name
    out = start(*LORA, out=tmp_path / "out", stop=2)
    start("--resume", out=out)
    assert rows(whole)[0]["kl"] == 0.0 and untimed(rows(out)) == untimed(rows(whole))


def test_without_peft_one_sentence_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert latro.main([*map(str, LORA), "--out", str(tmp_path / "out")]) == 1
    line = capsys.readouterr().err
    assert "pip install peft" in line and line.count("\n") == 1
    assert not (tmp_path / "out").exists()
