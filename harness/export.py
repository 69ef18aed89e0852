"""The trained model as a Hugging Face directory that loads as what was trained.

transformers 5 writes names that its previous generation, 4.57, does not know, or reads as a default
without a warning. The files here use names that mean the same to both.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig

REMOTE_CODE = "auto_map", "custom_pipelines"  # keys that name files of code


def export_model(policy: nn.Module, weights: dict[str, Tensor], tokenizer, folder: Path) -> None:
    """Writes a model in the base's dtype, as one file of weights, and its tokenizer.

    `weights` is the whole state dict of the policy, whose own tensors may be sharded."""
    dtype, tied = policy.config.dtype, policy.config.tie_word_embeddings and has_tied_head(policy)
    with torch.device("meta"):
        config = type(policy.config).from_dict(policy.config.to_dict())  # saving changes it
        config.tie_word_embeddings = tied
        shell = AutoModelForCausalLM.from_config(config, dtype=dtype)
    shell.load_state_dict({k: v.to(dtype) for k, v in weights.items()}, assign=True)
    head = shell.get_output_embeddings()
    if tied:
        shell.tie_weights()
    else:  # of a tensor with two names, save_pretrained writes only one
        head.weight = nn.Parameter(head.weight.detach().clone())
    shell.generation_config = GenerationConfig()
    shell.save_pretrained(folder, max_shard_size="1TB")
    # save_pretrained refuses some of the bases' generation_configs: a temperature without sampling.
    policy.generation_config.to_json_file(folder / "generation_config.json")
    tokenizer.save_pretrained(folder)
    rewrite(folder / "config.json", with_known_config, rope_factor(policy.model))
    rewrite(folder / "tokenizer_config.json", with_known_tokenizer, tokenizer)


def has_tied_head(model: nn.Module) -> bool:
    """Whether the head is the embedding's tensor. If a base's files hold two tensors that differ,
    transformers 5 trains both, even where the configuration says that they are one."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def rewrite(path: Path, change: Callable[..., dict], *rest) -> None:
    """Applies `change` to a JSON object in a file and takes out the keys that name code."""
    changed = change(json.loads(path.read_text(encoding="utf-8")), *rest)
    kept = {key: value for key, value in changed.items() if key not in REMOTE_CODE}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def rope_factor(decoder: nn.Module) -> float | None:
    """The factor on cos and sin, for longrope: of the full attention, where it has one for each
    kind of layer. None without rotary embeddings."""
    rotary = getattr(decoder, "rotary_emb", None)
    return getattr(rotary, "full_attention_attention_scaling",
                   getattr(rotary, "attention_scaling", None))


def with_known_config(config: dict, attention_scaling: float | None) -> dict:
    """config.json with names that both generations know, above all for `rope_parameters`."""
    if config["model_type"] == "qwen3_moe":  # 4.57 would take its default, 128
        config["num_experts"] = config["num_local_experts"]
    rope = dict(config.get("rope_parameters") or {})
    if "full_attention" in rope:  # one for each kind of layer
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    if not rope:
        return config
    config |= {k: rope.pop(k) for k in ("rope_theta", "partial_rotary_factor") if k in rope}
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    if rope["rope_type"] == "longrope":
        config["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
        if config["model_type"] == "phi3":  # 4.57 refuses other keys than type and the factors
            rope["type"] = rope.pop("rope_type")
            rope.pop("original_max_position_embeddings")
        else:
            rope["attention_factor"] = attention_scaling
    return config


def with_known_tokenizer(config: dict, tokenizer) -> dict:
    """tokenizer_config.json with names that both generations know.

    PreTrainedTokenizerFast takes tokenizer.json as it is. Other classes of 4.57 have defaults of
    their own: they would add tokens, or BOS, that training did not see."""
    config |= dict(padding_side=tokenizer.padding_side,
                   model_input_names=tokenizer.model_input_names)
    if tokenizer.is_fast:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):  # 4.57 expects a dict
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config
