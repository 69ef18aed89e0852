"""Proves that --out loads as what was trained, at every save, in transformers 5 and in 4.57.

4.57 takes part if TRANSFORMERS_ASIDE names a folder that holds it:

    pip install --no-deps --target DIR "transformers==4.57.*" "huggingface-hub<1" "tokenizers<0.23"
"""

import json
import math
import os
import sys
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import (AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, GenerationConfig,
                          GraniteConfig, LlamaConfig, LlamaTokenizer, MistralConfig, MixtralConfig,
                          Olmo2Config, Olmo3Config, Phi3Config, Qwen2Config, Qwen2Tokenizer,
                          Qwen3Config, Qwen3MoeConfig, SmolLM3Config)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this file is also a script
from conftest import TINY, TOY, begin, launch_jobs, one_process_group, rows, start, stopping

import latro  # after conftest, which puts the repository on the path
import load_model
import smollm2
from harness.export import export_model, has_tied_head

FLAGS = [*TINY, *"--K 2 --L 6 --steps 3 --save-every 1 --lr 1e-3".split()]
TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
TEMPLATES = dict(default=TURNS, tool_use="{{ messages | length }}")
ASIDE = os.environ.get("TRANSFORMERS_ASIDE")


def changed(folder, name, **changes):
    """Merges changes into a JSON file of a folder."""
    path = Path(folder, name)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def read(folder, name="config.json"):
    return json.loads(Path(folder, name).read_text())


def save(policy, folder, tokenizer=None):
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(TOY)
    export_model(policy, policy.state_dict(), tokenizer, folder)


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.fixture
def model(tmp_path):
    return copytree(TOY, tmp_path / "model")


# ---- the head

HEADS = {  # what config.json says, noise on the embedding in the file's head (None: no head): tied?
    "tied": (True, None, True),
    "tied by name, with a head of its own": (True, 0.05, False),
    "untied": (False, 0.05, False),
    "untied, at first equal": (False, 0.0, False)}


def set_head(model, says_tied, noise):
    """Writes a head into a model's files, as HEADS says."""
    changed(model, "config.json", tie_word_embeddings=says_tied)
    weights = load_file(model / "model.safetensors")
    if noise is not None:
        embedding = weights["model.embed_tokens.weight"]
        torch.manual_seed(0)
        weights["lm_head.weight"] = embedding + noise * torch.randn_like(embedding)
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def comparing(save_checkpoint):
    """latro.save_checkpoint; then --out must give the log-probs of the policy."""
    def wrapped(args, policy, optimizer, tokenizer, step):
        save_checkpoint(args, policy, optimizer, tokenizer, step)
        loaded = AutoModelForCausalLM.from_pretrained(args.out)
        policy.set_attn_implementation("sdpa")  # this project's needs a tree
        ours, theirs = load_model.logprobs(policy), load_model.logprobs(loaded)
        policy.set_attn_implementation("latro")
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        assert has_tied_head(policy) == has_tied_head(loaded) == args.out.endswith("-tied")
    return wrapped


def prepare_head(case, folder):
    """Flags of a run whose base has this head. The last one is --out."""
    says_tied, noise, tied = HEADS[case]
    set_head(copytree(TOY, folder / "model"), says_tied, noise)
    out = folder / ("out-tied" if tied else "out")
    return ["--model", folder / "model", "--task", "toy", *FLAGS, "--out", out]


def check_head(case, out):
    """A head is trained, saved and loaded as its own or as the embedding: at the first save, at a
    later one and at that of a resumed run."""
    *_, tied = HEADS[case]
    assert len(rows(out)) == 3
    assert read(out)["tie_word_embeddings"] == tied
    assert ("lm_head.weight" in load_file(out / "model.safetensors")) == (not tied)


@pytest.mark.parametrize("case", HEADS)
def test_head(case, tmp_path, monkeypatch):
    *flags, _, out = prepare_head(case, tmp_path)
    monkeypatch.setattr(latro, "save_checkpoint", comparing(latro.save_checkpoint))
    start(*flags, out=out, stop=2)
    start("--resume", out=out)
    check_head(case, out)


@pytest.mark.slow
def test_head_that_fsdp_shards(tmp_path):
    """Each run stops in its second update, and is resumed."""
    runs = {case: prepare_head(case, tmp_path / case) for case in HEADS}
    launch_jobs(__file__, [job for flags in runs.values()
                           for job in ((flags, 2), (["--resume", *flags[-2:]], None))], 2, tmp_path)
    for case, flags in runs.items():
        check_head(case, flags[-1])


def test_tensor_with_two_names(tmp_path):
    """An untied head that is the embedding's tensor is written too: save_pretrained would leave it
    out, and a load would make one up."""
    policy = AutoModelForCausalLM.from_pretrained(TOY)
    policy.config.tie_word_embeddings = False
    save(policy, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(load_model.logprobs(loaded), load_model.logprobs(policy))
    assert not read(tmp_path)["tie_word_embeddings"] and not has_tied_head(loaded)


# ---- files

@pytest.fixture
def templated(model):
    """The toy with two chat templates, one of which lies in a folder of its own. "The" begins a
    reply there without a space."""
    words = model / "tokenizer.json"
    words.write_text(words.read_text().replace('" born"', '"The"'))
    AutoTokenizer.from_pretrained(model, chat_template=TEMPLATES).save_pretrained(model)
    assert (model / "additional_chat_templates/tool_use.jinja").exists()
    return model


def test_several_chat_templates(templated, tmp_path):
    """Every save replaces them, file by file."""
    out = start("--model", templated, "--task", "toy", *FLAGS, out=tmp_path / "out")
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATES
    assert not (out / "state/export").exists()


def test_folder_in_the_way_of_a_save(templated, tmp_path, capsys):
    """The save fails with one sentence. The state before it stays, and the run goes on from it."""
    flags = ["--model", templated, "--task", "toy", *FLAGS]
    out = start(*flags, out=tmp_path / "out", stop=1)
    template = out / "additional_chat_templates/tool_use.jinja"
    template.unlink()
    template.mkdir()
    assert latro.main(["--resume", "--out", str(out)]) == 1
    assert "update 2 cannot be saved" in capsys.readouterr().err.splitlines()[-1]
    assert [state.name for state in out.glob("state/step-*")] == ["step-000001"]
    template.rmdir()
    start("--resume", out=out)
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATES and len(rows(out)) == 3


def test_code_of_the_base_is_not_named(model, tmp_path):
    """Its files are not there: a load with trust_remote_code would look for them."""
    changed(model, "config.json", auto_map=dict(AutoConfig="evil.Config"),
            custom_pipelines=dict(chat=dict(impl="evil.Pipeline")))
    changed(model, "tokenizer_config.json", auto_map=dict(AutoTokenizer=["evil.Slow", None]))
    out = start("--model", model, "--task", "toy", *FLAGS, out=tmp_path / "out")
    assert "evil" not in "".join(path.read_text() for path in out.glob("*config.json"))
    AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    AutoTokenizer.from_pretrained(out, trust_remote_code=True)


def test_generation_config_stays_the_base_s(model, tmp_path):
    """Also one that is not valid, as some bases have it, and one that was changed."""
    given = dict(eos_token_id=[1, 2], pad_token_id=0, temperature=0.6, top_p=0.9)
    changed(model, "generation_config.json", **given)
    policy = AutoModelForCausalLM.from_pretrained(model)
    policy.generation_config.top_p = given["top_p"] = 0.8
    save(policy, tmp_path / "out")
    written = read(tmp_path / "out", "generation_config.json")
    assert written == given | dict(transformers_version=written["transformers_version"])
    assert GenerationConfig.from_pretrained(tmp_path / "out").temperature == 0.6


def test_killed_save_leaves_nothing(tmp_path):
    """What lay in its folder does not get into --out."""
    out = start(*FLAGS, out=tmp_path / "out", stop=1)
    (out / "state/export").mkdir()
    (out / "state/export/pytorch_model.bin").write_text("half")
    start("--resume", out=out)
    assert not list(out.rglob("pytorch_model.bin"))


# ---- two generations of transformers

SMALL = dict(vocab_size=163, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
             eos_token_id=1, pad_token_id=0, bos_token_id=None, dtype=torch.float32)
LLAMA3 = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=16)
YARN = dict(rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=16)
FACTORS = dict(short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[1.5, 2.0, 3.0, 4.0])
KINDS = ["sliding_attention", "full_attention"]
GEMMA = dict(full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
             sliding_attention=dict(rope_type="default", rope_theta=1e4))
EIGHT = {name: [*factors, *factors] for name, factors in FACTORS.items()}


def unscaled(rope):
    return {key: value for key, value in rope.items() if key != "rope_theta"}


# A configuration, and what config.json must say of it for 4.57.
MODELS = {
    "llama, own theta": (
        LlamaConfig(**SMALL, rope_parameters=dict(rope_type="default", rope_theta=5000.0)),
        dict(rope_theta=5000.0, rope_scaling=None)),
    "llama, llama3": (
        LlamaConfig(**SMALL, rope_parameters=LLAMA3),
        dict(rope_theta=500000.0, rope_scaling=unscaled(LLAMA3))),
    "llama, dynamic": (
        LlamaConfig(**SMALL | dict(max_position_embeddings=32),
                    rope_scaling=dict(type="dynamic", factor=2.0)),
        dict(rope_theta=10000.0,
             rope_scaling=dict(type="dynamic", rope_type="dynamic", factor=2.0))),
    "llama, longrope": (
        LlamaConfig(**SMALL, rope_parameters=EIGHT | dict(
            rope_type="longrope", factor=8.0, original_max_position_embeddings=32)),
        dict(original_max_position_embeddings=32, rope_scaling=EIGHT | dict(
            rope_type="longrope", factor=8.0, original_max_position_embeddings=32,
            attention_factor=math.sqrt(1 + math.log(8) / math.log(32))))),
    "qwen2": (
        Qwen2Config(**SMALL, rope_theta=1e6, tie_word_embeddings=True),
        dict(rope_theta=1e6, rope_scaling=None, tie_word_embeddings=True)),
    "qwen2, yarn with a factor on attention": (
        Qwen2Config(**SMALL, rope_parameters=YARN | dict(attention_factor=1.5, beta_fast=16.0)),
        dict(rope_theta=1e6,
             rope_scaling=unscaled(YARN) | dict(attention_factor=1.5, beta_fast=16.0))),
    "qwen3, yarn": (
        Qwen3Config(**SMALL, head_dim=32, rope_parameters=YARN),
        dict(rope_theta=1e6, rope_scaling=unscaled(YARN))),
    "mistral, linear": (
        MistralConfig(**SMALL | dict(dtype=torch.bfloat16), sliding_window=24,
                      rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0)),
        dict(rope_theta=1e4, rope_scaling=dict(rope_type="linear", factor=2.0))),
    "phi3": (
        Phi3Config(**SMALL, partial_rotary_factor=0.5),
        dict(rope_theta=1e4, rope_scaling=None, partial_rotary_factor=0.5)),
    "phi3, longrope": (
        Phi3Config(**SMALL, partial_rotary_factor=0.5, original_max_position_embeddings=32,
                   rope_scaling=FACTORS | dict(type="longrope")),
        dict(rope_theta=1e4, partial_rotary_factor=0.5, original_max_position_embeddings=32,
             rope_scaling=FACTORS | dict(type="longrope"))),
    "gemma3, linear in full layers": (
        Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=6, layer_types=KINDS,
                         rope_parameters=GEMMA),
        dict(rope_theta=1e6, rope_local_base_freq=1e4,
             rope_scaling=dict(rope_type="linear", factor=8.0))),
    "olmo2": (Olmo2Config(**SMALL), dict(rope_theta=1e4, rope_scaling=None)),
    "olmo3": (Olmo3Config(**SMALL, sliding_window=6, layer_types=KINDS), dict(rope_scaling=None)),
    "smollm3": (SmolLM3Config(**SMALL, no_rope_layer_interval=2), dict(rope_scaling=None)),
    "granite": (GraniteConfig(**SMALL, logits_scaling=3.0), dict(rope_scaling=None)),
    "mixtral": (MixtralConfig(**SMALL, num_local_experts=4), dict(rope_scaling=None)),
    "qwen3_moe": (
        Qwen3MoeConfig(**SMALL, head_dim=16, moe_intermediate_size=24, num_experts=4,
                       num_experts_per_tok=2), dict(rope_scaling=None, num_experts=4))}


def make_model(config):
    """Random weights in the configuration's dtype, held in float32 as in training."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float().eval()


@pytest.mark.parametrize("name", MODELS)
def test_config_for_both_generations(name, tmp_path):
    config, said = MODELS[name]
    policy = make_model(config)
    save(policy, tmp_path)
    assert read(tmp_path) == read(tmp_path) | said
    for _ in range(2):  # a run may start from what another has written
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
        assert loaded.dtype == config.dtype
        assert_same(load_model.logprobs(loaded.float()), load_model.logprobs(policy))
        save(loaded, tmp_path)
    assert read(tmp_path) == read(tmp_path) | said


def make_tokenizers():
    """The toy's tokenizer, with more than it has, and tokenizers of classes whose defaults differ
    between the generations. With each, the name of one of MODELS."""
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>", "<|im_end|>"]
    pieces = ["<unk>", "<s>", "</s>", "\u2581", *map(chr, range(33, 127))]
    qwen, llama = ({piece: i for i, piece in enumerate(v)} for v in (alphabet, pieces))
    return {
        "toy": ("llama, own theta", AutoTokenizer.from_pretrained(TOY)),
        "chat": ("llama, llama3", AutoTokenizer.from_pretrained(TOY, chat_template=TURNS)),
        "more special tokens": ("phi3", AutoTokenizer.from_pretrained(
            TOY, extra_special_tokens=["Question", "Answer"])),
        "several chat templates": ("mistral, linear", AutoTokenizer.from_pretrained(
            TOY, chat_template=TEMPLATES)),
        "qwen": ("qwen2", Qwen2Tokenizer(qwen, [], eos_token="<|im_end|>", unk_token=None,
                                         pad_token=None)),
        "llama": ("llama, own theta", LlamaTokenizer(llama, [], add_bos_token=True)),
        "llama, no BOS": ("llama, own theta", LlamaTokenizer(llama, [], add_bos_token=False))}


@pytest.mark.parametrize("name", make_tokenizers())
def test_tokenizer_for_both_generations(name, tmp_path):
    model, tokenizer = make_tokenizers()[name]
    save(make_model(MODELS[model][0]), tmp_path, tokenizer)
    written = read(tmp_path, "tokenizer_config.json")
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"  # TokenizersBackend: 5 only
    assert not isinstance(written.get("extra_special_tokens"), list)  # 4.57 calls its keys()
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert load_model.tokens(loaded) == load_model.tokens(tokenizer)


def assert_loads_aside(saved, monkeypatch):
    """`saved`: {folder: (policy, tokenizer)}. transformers 4.57 finds the same there."""
    if not ASIDE:
        pytest.skip("TRANSFORMERS_ASIDE names no folder with transformers 4.57")
    monkeypatch.setenv("PYTHONPATH", ASIDE)
    run = begin(load_model.__file__, *saved)
    _, errors = run.communicate(timeout=600)
    assert run.returncode == 0, errors[-3000:]
    for folder, (policy, tokenizer) in saved.items():
        loaded = torch.load(folder / "loaded.pt")
        assert loaded["version"].startswith("4.57.")
        assert loaded["dtype"] == policy.config.dtype, folder
        assert loaded["stops"] == policy.generation_config.eos_token_id, folder
        assert loaded["tokens"] == load_model.tokens(tokenizer), folder
        assert_same(loaded["logp"], load_model.logprobs(policy))


@pytest.mark.slow
def test_loads_in_the_previous_generation(tmp_path, monkeypatch):
    """Every kind of model with the toy's tokenizer, a head of its own, every kind of tokenizer."""
    toy = AutoTokenizer.from_pretrained(TOY)
    pairs = {name: (make_model(config), toy) for name, (config, _) in MODELS.items()}
    apart = AutoModelForCausalLM.from_pretrained(TOY)
    apart.lm_head.weight = torch.nn.Parameter(torch.randn(apart.lm_head.weight.shape))
    pairs["toy"], pairs["apart"] = (AutoModelForCausalLM.from_pretrained(TOY), toy), (apart, toy)
    for name, (model, tokenizer) in make_tokenizers().items():
        pairs[f"tokenizer {name}"] = pairs[model][0], tokenizer
    for name, (policy, tokenizer) in pairs.items():
        save(policy, tmp_path / name, tokenizer)
    assert_loads_aside({tmp_path / name: pair for name, pair in pairs.items()}, monkeypatch)


@pytest.mark.real
def test_real_model_loads_in_the_previous_generation(tmp_path, monkeypatch):
    base = smollm2.convert(tmp_path / "base")
    policy = AutoModelForCausalLM.from_pretrained(base, dtype="auto").float().eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    save(policy, tmp_path / "out", tokenizer)
    assert_loads_aside({tmp_path / "out": (policy, tokenizer)}, monkeypatch)


if __name__ == "__main__":
    latro.save_checkpoint, optimizer_step = comparing(latro.save_checkpoint), latro.optimizer_step
    with one_process_group():
        for flags, stop in json.loads(Path(sys.argv[1]).read_text()):
            latro.optimizer_step = stopping(optimizer_step, stop)
            assert not latro.main(flags)
