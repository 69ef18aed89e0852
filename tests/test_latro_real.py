"""Proves that a real model runs on real data: SmolLM2-135M-Instruct on GSM8K and ARC-Challenge.

    OMP_NUM_THREADS=2 pytest -m real tests/test_latro_real.py   without it, one thread
    LATRO_SMOLLM2=DIR pytest -m real tests/test_latro_real.py   with what smollm2.py made there

This shows that everything fits together outside the toy: a chat template, a vocabulary of 49152,
grouped heads, bfloat16 weights, rationales in plain English. Nothing is learned in two updates.
"""

import math
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

import latro
from harness import data, distributed
from conftest import ROOT, launch, rows

DATA = ROOT.parent / "shared" / "data"
SMALL = "--questions 2 --K 4 --eval-questions 2 --steps 2 --L 40 --lr 1e-5".split()

pytestmark = pytest.mark.real


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    given = os.environ.get("LATRO_SMOLLM2", "")
    if Path(given, "model.safetensors").is_file():
        return Path(given)
    from smollm2 import convert  # here, so that collecting this file needs no gguf
    return convert(tmp_path_factory.mktemp("smollm2"))


def data_dir(task):
    if not (DATA / task / "train.jsonl").exists():
        pytest.skip(f"{DATA / task} is not there")
    return DATA / task


def run(model, task, out):
    """A run of the script, its log checked; returns the metrics."""
    where = ["--model", model, "--task", task, "--data", data_dir(task), "--out", out]
    code, _, errors = launch(*where, *SMALL)
    assert code == 0, errors[-3000:]
    metrics, evals = rows(out), rows(out, "evals")
    assert len(metrics) == 2
    for row in metrics:
        # no correlation where the rationales of a question all lead to the answer, or none does
        numbers = [v for k, v in row.items() if k != "seconds" and (k, v) != ("reward_right", None)]
        assert all(math.isfinite(v) for v in numbers) and row["grad_norm"] > 0 and row["z_len"] > 1
    assert metrics[0]["kl"] == 0.0 and metrics[-1]["kl"] != 0.0
    assert [row["step"] for row in evals] == [0, 2] and evals[0]["n"] == 2
    return metrics


def test_gsm8k(model, tmp_path):
    """The fine-tuned model is an ordinary one, in the base's bfloat16, and has moved."""
    metrics = run(model, "gsm8k", tmp_path / "out")
    assert metrics[0]["reward_std"] > 0.1
    tuned, base = (AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
                   for folder in (tmp_path / "out", model))
    assert tuned.dtype == base.dtype == torch.bfloat16
    ours, theirs = tuned.config.to_dict(), base.config.to_dict()
    assert ours == theirs | dict(_name_or_path=ours.get("_name_or_path"))
    pairs = zip(tuned.parameters(), base.parameters(), strict=True)
    moved = [not torch.equal(p, q) for p, q in pairs]
    assert sum(moved) > len(moved) / 2  # 1e-5 is less than bfloat16 resolves in the norms' weights
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    asked = [dict(role="user", content="What is 2 + 3?")]
    x = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True,
                                      return_tensors="pt")
    reply = tuned.generate(**x, max_new_tokens=12, do_sample=False)[0, x["input_ids"].shape[1]:]
    assert tokenizer.decode(reply, skip_special_tokens=True).strip()


def test_arc_challenge(model, tmp_path):
    run(model, "arc_challenge", tmp_path / "out")


def test_a_gold_rationale_makes_the_answer_likelier(model):
    """What LaTRO relies on, the paper's figure 2: log p(y|x+z) against log p(y|x), both by the
    tree. The tree's number equals that of plain transformers on the whole text."""
    args = latro.parse(["--model", str(model), "--task", "gsm8k", "--data", str(data_dir("gsm8k"))])
    codec, examples, _ = data.load_datasets(args)
    policy = latro.load_model(args, distributed.init_distributed(), torch.float32,
                              latro.logprobs)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    gains = []
    try:
        for e in examples[:8]:
            forms = [([], codec.template_at_start), (e.z, codec.template_after_z)]
            group = [latro.Rationale([], z, len(z), template + e.answer, len(z), False)
                     for z, template in forms]
            tree = latro.pack_tree([e.x], [group], 1.0, policy)
            with torch.no_grad():
                without, given = latro.sum_spans(policy.logprobs(tree), *tree.spans)[1].tolist()
                y = group[1].y
                whole = torch.tensor([e.x + e.z + y])
                logp = plain(whole).logits[0, -len(y) - 1:-1].log_softmax(-1)
            assert given == pytest.approx(float(logp[range(len(y)), y].sum()), abs=1e-2)
            gains.append(given - without)
    finally:
        dist.destroy_process_group()
    assert sum(gains) / len(gains) > 5


def test_ids_are_those_of_the_whole_text(model):
    """Nothing moves at the seams: prompt, rationale, template and answer, each tokenised
    separately, are the chat template's ids of the whole conversation. Digits are single tokens
    here, after a space of their own: a wrong seam would cost nats."""
    args = latro.parse(["--model", str(model), "--task", "gsm8k", "--data", str(data_dir("gsm8k"))])
    codec, examples, _ = data.load_datasets(args)
    for e in examples[:200]:
        reply = f"{codec.text(e.z)}{codec.tokenizer.decode(codec.template_after_z)} {e.gold}."
        asked = f"{e.question} Let's think step by step."
        chat = [dict(role="user", content=asked), dict(role="assistant", content=reply)]
        whole = codec.tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
        ours = e.x + e.z + codec.template_after_z + e.answer
        assert ours == whole[:len(ours)] and len(whole) - len(ours) <= 1  # a last newline
