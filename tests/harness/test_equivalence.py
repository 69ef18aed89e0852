"""Proves that a model whose log-probs would not be its own here is refused when it is loaded."""

import pytest
import torch
from test_latro_tree import CONFIGS, model
from transformers import Gemma2Config, GptOssConfig, MambaConfig, T5Config

import latro
from harness import equivalence
from harness.equivalence import WINDOW, check_equivalence, differences
from harness.errors import UserError
from harness.model import unsupported
from kernels import attention, decode


@pytest.mark.parametrize("name", CONFIGS)
def test_supported_models_pass(name):
    """And nothing of the model has changed afterwards."""
    policy = model(name)
    windows = [getattr(m, "sliding_window", None) for m in [policy.config, *policy.modules()]]
    found, allowed = differences(policy, latro.pack_branches)
    print(f"{name}: {found}")
    assert max(found.values()) < 1e-5 < allowed
    assert [getattr(m, "sliding_window", None)
            for m in [policy.config, *policy.modules()]] == windows
    assert policy.config._attn_implementation == "latro"


@pytest.mark.parametrize("name", ["gemma3", "granite", "mixtral", "qwen3_moe"])
def test_supported_models_pass_in_half_precision(name, monkeypatch):
    """bfloat16 differs more, and more is allowed."""
    monkeypatch.setattr(equivalence, "compute_dtype", lambda device: torch.bfloat16)
    found, allowed = differences(model(name, dtype=torch.bfloat16), latro.pack_branches)
    print(f"{name}: {found}, {allowed:.1e} allowed")
    assert 1e-5 < max(found.values()) < allowed < 0.2


GROUPED, MASKS = attention.grouped_attention, attention.causal_masks


MUTANTS = dict(  # where a model could differ: model, what to break, how, what the sentence names
    scale=("llama", attention, "grouped_attention",
           lambda q, k, v, mask, scaling: GROUPED(q, k, v, mask, 1.1 * scaling), "scoring"),
    no_divisor=("granite", latro, "logits_divisor", lambda config: 1.0, "scoring"),
    no_divisor_in_sampling=("granite", equivalence, "logits_divisor", lambda config: 1.0,
                            "sampling"),
    wide_window=("olmo3", attention, "causal_masks", lambda query, key, config: {
        None: MASKS(query, key, config)[None], WINDOW: MASKS(query, key, config)[None]},
        "sliding window"))


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_model_that_differs_is_refused(mutant, monkeypatch):
    name, module, attribute, broken, word = MUTANTS[mutant]
    policy = model(name)
    monkeypatch.setattr(module, attribute, broken)
    with pytest.raises(UserError, match=f"--model {name}: .*{word}"):
        check_equivalence(policy, latro.pack_branches, name)


def test_a_position_that_only_decoding_gets_wrong(monkeypatch):
    policy, step = model("qwen3"), decode.Decoder.decode_step

    def late(self, token):
        self.padding = self.padding - 1
        return step(self, token)
    monkeypatch.setattr(decode.Decoder, "decode_step", late)
    with pytest.raises(UserError, match=r"sampling gives .* \(its cache"):
        check_equivalence(policy, latro.pack_branches, "qwen3")


@pytest.mark.parametrize("config, reason", [
    (Gemma2Config(), "final_logit_softcapping, attn_logit_softcapping"),
    (GptOssConfig(), "attention sinks"), (MambaConfig(), "linear_attention layers"),
    (T5Config(), "is_encoder_decoder")], ids=lambda v: getattr(v, "model_type", None))
def test_reasons_that_the_configuration_gives(config, reason):
    assert reason in ", ".join(unsupported(config))
