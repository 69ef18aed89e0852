"""Loading a model: what is not there, or would give wrong log-probs, is refused in one sentence."""

from collections.abc import Callable
from pathlib import Path
from types import MethodType

import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kernels.attention import attention, patch_model

from .distributed import apply_fsdp, processes
from .errors import UserError, short_error
from .lora import add_adapters
from .memory import needs_activation_checkpointing

AttentionInterface.register("latro", attention)
transformers.logging.disable_progress_bar()


def from_pretrained(kind, args):
    """The configuration or tokenizer of --model. Raises UserError for one that is not there."""
    try:
        return kind.from_pretrained(args.model, trust_remote_code=False)
    except Exception as e:  # a directory may hold anything, and each library raises its own
        here = "no whole model" if Path(args.model).is_dir() else "no directory, nor on the hub"
        raise UserError(f"--model {args.model}: {here} ({short_error(e)}); pass a directory in"
                        " Hugging Face's format, or a hub id") from e


def unsupported(config) -> list[str]:
    """The features of a model for which log-probs are known not to be exact here; [] if none. No
    weights are needed."""
    known = ("final_logit_softcapping", "attn_logit_softcapping", "logit_scale",
             "is_encoder_decoder")
    features = [name for name in known if getattr(config, name, None)]
    kinds = {*(getattr(config, "layer_types", None) or [])}
    features += [f"{kind} layers"
                 for kind in sorted(kinds - {"full_attention", "sliding_attention"})]
    if features:
        return features
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception:  # each architecture raises its own
        return ["no decoder that transformers can build"]
    blocks = getattr(getattr(model, "model", None), "layers", [])
    if not blocks or not all(hasattr(block, "self_attn") for block in blocks):
        return ["layers without self-attention, or elsewhere than in model.layers"]
    if any(hasattr(block.self_attn, "sinks") for block in blocks):
        return ["attention sinks"]
    return []


def load_config(args):
    """The configuration of --model. Raises UserError for a model that is not there or not
    supported."""
    config = from_pretrained(AutoConfig, args)
    if getattr(config, "quantization_config", None):
        raise UserError(f"--model {args.model}: its weights are quantised, and cannot be trained;"
                        " dequantise them first: load it with transformers, call dequantize() and"
                        " save_pretrained()")
    if features := unsupported(config):
        raise UserError(f"--model {args.model}: {config.model_type} has {', '.join(features)},"
                        " which is not supported; take another decoder, such as Llama or Qwen3")
    return config


def load_tokenizer(args, config):
    """The tokenizer of --model. Raises UserError for one that is not there, or not this model's."""
    tokenizer = from_pretrained(AutoTokenizer, args)
    if len(tokenizer) > config.vocab_size:
        raise UserError(f"--model {args.model}: its tokenizer has {len(tokenizer)} tokens, its"
                        f" embedding {config.vocab_size}; they do not belong together")
    return tokenizer


def check_same_shape(args, initial) -> None:
    """Raises UserError for a --reference that has other tokens or other sizes than --model."""
    if initial.model == args.model:
        return
    ours, theirs = load_config(args), load_config(initial)
    sizes = "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"
    different = [k for k in sizes if getattr(ours, k) != getattr(theirs, k)]
    if load_tokenizer(args, ours).get_vocab() != load_tokenizer(initial, theirs).get_vocab():
        different.append("tokens")
    if different:
        raise UserError(f"--reference {initial.model}: differs from --model {args.model} in"
                        f" {', '.join(different)}; take a model of the same kind and size")


def load_model(args, device: torch.device, dtype: torch.dtype, logprobs: Callable) -> nn.Module:
    """--model on its device, parameters in dtype, with this project's attention, sharded by FSDP2.

    `logprobs` (model, tree) becomes a method, so that FSDP's hooks gather the weights around it.
    Activation checkpointing is on if the flag says so, or if --plan's arithmetic asks for it.
    Raises UserError, before anything is read, for a model that does not fit."""
    config = load_config(args)
    checkpointing = needs_activation_checkpointing(config, args, processes(), device)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            args.model, dtype="auto", use_safetensors=True, trust_remote_code=False,
            output_loading_info=True)
    except Exception as e:  # as above
        raise UserError(f"--model {args.model}: its weights cannot be read ({short_error(e)});"
                        " fetch or save them again, as safetensors") from e
    if missing := found["missing_keys"]:  # transformers would initialize them at random
        raise UserError(f"--model {args.model}: its files lack {len(missing)} weights, such as"
                        f" {min(missing)}; fetch or save them again")
    model.logprobs = MethodType(logprobs, patch_model(model))
    if args.lora_rank:
        add_adapters(model, args)
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable",
                         model.gradient_checkpointing_enable)
        enable()
    return apply_fsdp(model, device, dtype, args.shard)
