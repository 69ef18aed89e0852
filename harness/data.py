"""What a data set asks: rows -> questions, gold answers and gold rationales, as text and token ids.

GSM8K {question, answer: "... #### N"} and ARC-Challenge {question, choices: {text, label},
answerKey} are as on the hub. Any other JSONL has {question, answer} and perhaps a rationale.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import transformers

from kernels.attention import max_context

from .answers import TEMPLATE
from .errors import UserError, short_error
from .model import load_config


# ------------------------------------------------------------------------------ rows
def gsm8k(row: dict) -> tuple[str, str, str]:
    """(question, gold answer, gold rationale) of a row, as the other tasks below."""
    steps, gold = row["answer"].rsplit("####", 1)
    return f"{row['question']} Let's think step by step.", gold, re.sub("<<.*?>>", "", steps)


def arc_challenge(row: dict) -> tuple[str, str, str]:
    options = dict(zip(row["choices"]["label"], row["choices"]["text"], strict=True))
    lines = [row["question"], *(f"- {o}" for o in options.values()), "Let's think step by step."]
    return "\n".join(lines), options[row["answerKey"]], ""


def qa(row: dict) -> tuple[str, str, str]:
    return row["question"], row["answer"], row.get("rationale", "")


TASKS = {"gsm8k": gsm8k, "arc_challenge": arc_challenge, "toy": qa, "qa": qa}
CONFIGS = {"gsm8k": "main", "arc_challenge": "ARC-Challenge"}  # names within the hub's data sets


def read_rows(args, split: str) -> list[tuple[str, dict]]:
    """(place, row) of {--data}/{split}.jsonl, or of the hub's split; [] if there is none.

    Raises UserError for a data set that is not there, a line that is not JSON, or a repeated id."""
    if not Path(args.data).is_dir():
        import datasets  # only where the hub is asked
        try:
            hub = datasets.load_dataset(args.data, CONFIGS.get(args.task))
        except Exception as e:  # offline, missing, gated: each its own class, one way out
            raise UserError(f"--data {args.data}: no directory here, nor to be had from the hub"
                            f" ({short_error(e)}); pass a directory with train.jsonl and"
                            " test.jsonl") from e
        rows = enumerate(hub.get(split, []))
        return check_unique([(f"{args.data} {split} {i}", row) for i, row in rows])
    path, rows = Path(args.data, f"{split}.jsonl"), []
    for i, line in enumerate(path.open("rb") if path.exists() else [], 1):
        try:
            rows.append((f"{path}:{i}", json.loads(line)))
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path}:{i}: not JSON in UTF-8; every line is one object") from e
    return check_unique(rows)


def check_unique(rows: list[tuple[str, dict]]) -> list[tuple[str, dict]]:
    """The rows. Raises UserError where two have the same "id": a file was included twice."""
    first_place = {}
    for place, row in rows:
        name = repr(row["id"]) if isinstance(row, dict) and "id" in row else place
        first = first_place.setdefault(name, place)
        if first != place:
            raise UserError(f"{place}: the id {name} is that of {first} too; leave one of them out")
    return rows


# ------------------------------------------------------------------------------ token ids
class Example(NamedTuple):
    """A row of a data set, as text and as token ids."""

    question: str
    gold: str  # the answer as text
    x: list[int]  # the prompt
    answer: list[int]  # what follows the template: " 18." and the end of the turn
    z: list[int]  # the gold rationale; [] without one
    place: str = ""  # file and line


class Codec:
    """Text to token ids, once: nothing that was sampled is decoded and tokenised again.

    The template is "The answer is": as ids, it is `template_at_start` at the start of a reply and
    `template_after_z` after a rationale; `stops` are all forms of it that end a rationale."""

    def __init__(self, tokenizer, task: str, eos: list[int]):
        self.tokenizer, self.task, self.eos = tokenizer, task, eos
        self.chat = bool(tokenizer.chat_template)
        reply = self.turns("a", "b")[len(self.turns("a")):] if self.chat else []
        self.turn_end = next((t for t in reply if t in eos), eos[0])
        self.template_at_start = self.opening(TEMPLATE)
        self.template_after_z = self.after(".", " " + TEMPLATE)
        if not (self.template_at_start and self.template_after_z):
            raise UserError(f"this tokenizer does not keep {TEMPLATE!r} apart from what precedes"
                            " it")
        found = [self.after(end, gap + TEMPLATE) for end in ".\n" for gap in ("", " ", "\n")]
        forms = {(*v,) for v in found + [self.template_at_start]
                 if v and tokenizer.unk_token_id not in v}
        self.stops = sorted(v for v in forms if not any(v != w == v[-len(w):] for w in forms))

    def after(self, before: str, text: str) -> list[int]:
        """The ids of `text` after `before`; [] where a token would span both."""
        head, whole = (self.tokenizer(t, add_special_tokens=False)["input_ids"]
                       for t in (before, before + text))
        return whole[len(head):] if whole[:len(head)] == head else []

    def opening(self, text: str) -> list[int]:
        """The ids of `text` at the start of a reply."""
        return self.after("", text) if self.chat else self.after(":", " " + text)

    def turns(self, *contents: str) -> list[int]:
        """The ids of a conversation: a question, and perhaps its reply, in the chat template."""
        chat = [dict(role=role, content=c) for role, c in zip(("user", "assistant"), contents)]
        try:
            return self.tokenizer.apply_chat_template(
                chat, add_generation_prompt=len(chat) == 1, return_dict=True)["input_ids"]
        except Exception as e:  # a template is a program
            raise UserError(f"this model's chat template fails ({short_error(e)}); mend it") from e

    def example(self, place: str, row: dict) -> Example:
        """A row as an Example. Raises UserError, naming the row, where a field is missing or the
        answer is empty."""
        try:
            question, gold, z = (text.strip() for text in TASKS[self.task](row))
            (question + gold + z).encode()  # half a surrogate pair is JSON, but not text
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise UserError(f"{place}: not a row of --task {self.task} ({short_error(e)})") from e
        if not gold or not self.after(TEMPLATE, f" {gold}"):
            raise UserError(f"{place}: the answer {gold!r} tokenises to nothing; mend the row")
        plain = f"Question: {question}\nAnswer:"
        x = self.turns(question) if self.chat else self.tokenizer(plain)["input_ids"]
        answer = [*self.after(TEMPLATE, f" {gold.removesuffix('.')}."), self.turn_end]
        return Example(question, gold, x, answer, self.opening(z) if z else [], place)

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


def load_codec(args) -> tuple[Codec, int]:
    """The codec of --model, and how many tokens the model's context holds."""
    config, tokenizer = load_config(args)
    try:
        eos = transformers.GenerationConfig.from_pretrained(args.model).eos_token_id
    except OSError:
        eos = config.eos_token_id
    eos = [t for t in (*np.atleast_1d(eos).tolist(), tokenizer.eos_token_id) if t is not None]
    if not eos:
        raise UserError(f"--model {args.model}: no EOS in its configuration or tokenizer; set one")
    return Codec(tokenizer, args.task, [*dict.fromkeys(eos)]), max_context(config)


def encode(codec: Codec, context: int, rows: list[tuple[str, dict]], args) -> list[Example]:
    """Rows as token ids. Raises UserError for a row that `context` tokens cannot hold."""
    examples = [codec.example(*row) for row in rows]
    for e in examples:
        needed = len(e.x) + max(args.L, len(e.z)) + len(codec.template_after_z + e.answer)
        if needed > context:
            raise UserError(f"{e.place}: {len(e.x)} tokens of prompt, --L {args.L} and an answer"
                            f" exceed the model's context of {context}; lower --L or drop the row")
    return examples


def load_datasets(args) -> tuple[Codec, list[Example], list[Example]]:
    """(codec, training questions, held-out questions). Checks everything that needs no weights.

    Without a validation split the last sixteenth of train is held out. The test split is never
    read: whoever looks at it while training selects by it."""
    codec, context = load_codec(args)
    rows, held_out = read_rows(args, "train"), read_rows(args, "validation")
    if not held_out:
        n = max(1, len(rows) // 16)
        rows, held_out = rows[:-n], rows[-n:]
    if not rows:
        raise UserError(f"--data {args.data}: needs a train split of 2 rows or more")
    train_set, held_out = (encode(codec, context, r, args)
                           for r in (rows, held_out[:args.eval_questions]))
    return codec, train_set, held_out
