"""What the rows of a data set ask, as text and as token ids.

GSM8K {question, answer: "... #### N"} and ARC-Challenge {question, choices: {text, label},
answerKey} are as on the hub; any other JSONL has {question, answer} and perhaps a rationale.
Each becomes (question, gold answer, gold rationale or "").
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

from .answers import TEMPLATE
from .problems import Problem, brief


def gsm8k(row: dict) -> tuple[str, str, str]:
    steps, gold = row["answer"].rsplit("####", 1)
    return f"{row['question']} Let's think step by step.", gold, re.sub("<<.*?>>", "", steps)


def arc_challenge(row: dict) -> tuple[str, str, str]:
    options = dict(zip(row["choices"]["label"], row["choices"]["text"], strict=True))
    asked = [row["question"], *(f"- {o}" for o in options.values()), "Let's think step by step."]
    return "\n".join(asked), options[row["answerKey"]], ""


def qa(row: dict) -> tuple[str, str, str]:
    return row["question"], row["answer"], row.get("rationale", "")


TASKS = {"gsm8k": gsm8k, "arc_challenge": arc_challenge, "toy": qa, "qa": qa}
CONFIGS = {"gsm8k": "main", "arc_challenge": "ARC-Challenge"}  # within the hub's data sets


def read_rows(args, split: str) -> list[tuple[str, dict]]:
    """(where it stands, row) of {--data}/{split}.jsonl, or of the hub's split; [] without one."""
    if not Path(args.data).is_dir():
        import datasets  # only where the hub is asked
        try:
            hub = datasets.load_dataset(args.data, CONFIGS.get(args.task))
        except Exception as e:  # offline, missing, gated: each its own class, one way out
            raise Problem(f"--data {args.data}: no directory here, nor to be had from the hub"
                          f" ({brief(e)}); pass a directory with train.jsonl and test.jsonl") from e
        rows = enumerate(hub.get(split, []))
        return unrepeated([(f"{args.data} {split} {i}", row) for i, row in rows])
    path, rows = Path(args.data, f"{split}.jsonl"), []
    for i, line in enumerate(path.open("rb") if path.exists() else [], 1):
        try:
            rows.append((f"{path}:{i}", json.loads(line)))
        except (ValueError, RecursionError) as e:
            raise Problem(f"{path}:{i}: not JSON in UTF-8; every line is one object") from e
    return unrepeated(rows)


def unrepeated(rows: list[tuple[str, dict]]) -> list[tuple[str, dict]]:
    """The rows; raises Problem where two have the same "id": one file went in twice."""
    seen = {}
    for where, row in rows:
        name = repr(row["id"]) if isinstance(row, dict) and "id" in row else where
        if (first := seen.setdefault(name, where)) != where:
            raise Problem(f"{where}: the id {name} is that of {first} too; leave one of them out")
    return rows


class Example(NamedTuple):
    """A row as text, and as ids: prompt, " 18." with end of turn, gold rationale or nothing."""

    ask: str
    gold: str
    x: list[int]
    answer: list[int]
    z: list[int]
    where: str = ""


class Codec:
    """Text to token ids, once: nothing that was sampled is decoded and tokenised again."""

    def __init__(self, tokenizer, task: str, eos: list[int]):
        self.tokenizer, self.task, self.eos = tokenizer, task, eos
        self.chat = bool(tokenizer.chat_template)
        reply = self.turns("a", "b")[len(self.turns("a")):] if self.chat else []
        self.turn_end = next((t for t in reply if t in eos), eos[0])
        self.lead = self.opening(TEMPLATE)  # the template as a reply's first words, and after a z
        self.join = self.after(".", " " + TEMPLATE)
        if not (self.lead and self.join):
            raise Problem(f"this tokenizer does not keep {TEMPLATE!r} apart from what precedes it")
        found = [self.after(end, gap + TEMPLATE) for end in ".\n" for gap in ("", " ", "\n")]
        ways = {(*v,) for v in found + [self.lead] if v and tokenizer.unk_token_id not in v}
        self.stops = sorted(v for v in ways if not any(v != w == v[-len(w):] for w in ways))

    def after(self, before: str, text: str) -> list[int]:
        """The ids of `text` behind `before`; [] where a token would span both."""
        head, whole = (self.tokenizer(t, add_special_tokens=False)["input_ids"]
                       for t in (before, before + text))
        return whole[len(head):] if whole[:len(head)] == head else []

    def opening(self, text: str) -> list[int]:
        """The ids of `text` at the start of a reply."""
        return self.after("", text) if self.chat else self.after(":", " " + text)

    def turns(self, *contents: str) -> list[int]:
        chat = [dict(role=role, content=c) for role, c in zip(("user", "assistant"), contents)]
        try:
            return self.tokenizer.apply_chat_template(
                chat, add_generation_prompt=len(chat) == 1, return_dict=True)["input_ids"]
        except Exception as e:  # a template is a program
            raise Problem(f"this model's chat template fails ({brief(e)}); mend it") from e

    def example(self, where: str, row: dict) -> Example:
        """What a row asks; `where` it stands.

        Raises Problem, naming the row, where a field is missing or the answer is empty."""
        try:
            ask, gold, z = (text.strip() for text in TASKS[self.task](row))
            (ask + gold + z).encode()  # half a surrogate pair is JSON, but no text
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise Problem(f"{where}: not a row of --task {self.task} ({brief(e)})") from e
        if not gold or not self.after(TEMPLATE, f" {gold}"):
            raise Problem(f"{where}: the answer {gold!r} tokenises to nothing; mend the row")
        plain = f"Question: {ask}\nAnswer:"
        x = self.turns(ask) if self.chat else self.tokenizer(plain)["input_ids"]
        answer = [*self.after(TEMPLATE, f" {gold.removesuffix('.')}."), self.turn_end]
        return Example(ask, gold, x, answer, self.opening(z) if z else [], where)

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()
