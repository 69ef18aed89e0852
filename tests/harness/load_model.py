"""Loads Hugging Face directories with the transformers that the path leads to.

    python load_model.py DIR...     writes DIR/loaded.pt: what the model and its tokenizer give
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, __version__

TEXT = "Question: Tom owns 3 cookies.  <eos> How many are left?\n\n12345 don't , you're"
CHAT = [dict(role="user", content="Tom wins 2 more."), dict(role="assistant", content="5.")]


def logprobs(model) -> list[torch.Tensor]:
    """Of a short and of a long sequence: RoPE may depend on the length."""
    ids = (torch.arange(60)[None] * 37 + 11) % 160
    with torch.no_grad():
        return [model(ids[:, :n]).logits.float().log_softmax(-1) for n in (20, 60)]


def tokens(tokenizer) -> dict:
    """What a tokenizer makes of a text and of a chat."""
    given = tokenizer(TEXT)
    chat = tokenizer.chat_template and tokenizer.apply_chat_template(CHAT, return_dict=True)
    ids = given["input_ids"]
    return dict(ids=ids, names=sorted(given), text=tokenizer.decode(ids),
                chat=chat and chat["input_ids"], special=sorted(tokenizer.all_special_ids),
                padding=tokenizer.padding_side, n=len(tokenizer))


def load(folder) -> dict:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    stops = GenerationConfig.from_pretrained(folder).eos_token_id
    return dict(version=__version__, dtype=model.dtype, stops=stops, logp=logprobs(model.float()),
                tokens=tokens(AutoTokenizer.from_pretrained(folder)))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        torch.save(load(name), Path(name, "loaded.pt"))
