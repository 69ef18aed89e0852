"""Text to token ids and back: prompts, answers, and the places where a rationale ends.

A question is tokenised once. Nothing that was sampled is decoded and tokenised again.
"""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from datetime import date
from typing import NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor

from kernels.attention import max_context

from .answers import TEMPLATE, answer_in, same_answer
from .errors import UserError, short_error
from .model import load_config, load_tokenizer

REPLY = "REPLY"  # a text that no chat template contains
CLOCK = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")  # a call in a chat template


class Example(NamedTuple):
    """A row of a data set, as text and as token ids."""

    question: str
    gold: str  # the answer as text
    x: list[int]  # the prompt
    answer: list[int]  # what follows the template: " 18." and the end of the turn
    z: list[int]  # the gold rationale; [] without one
    place: str = ""  # file and line
    options: tuple[str, ...] = ()  # that the question offers


def matched_at_end(text: str, template: str) -> int:
    """How many characters of the template a text ends with. All of them also if only punctuation or
    space follows."""
    tail = text[text.rfind(template[0]):] if template[0] in text else ""
    if template.startswith(tail):
        return len(tail)
    whole = tail.startswith(template) and is_boundary(tail[len(template):])
    return len(template) if whole else 0


def is_boundary(text: str) -> bool:
    """Whether nothing in a text could be part of the template's last word or of an answer."""
    return not any(c.isalnum() for c in text)


def stop_table(texts: list[str], template: str = TEMPLATE) -> Tensor:
    """How far each token takes a reply into the template, however the tokenizer cuts it.

    `texts` are those of the V tokens. Returns (n + 1, V) int8 for a template of n characters. If m
    characters were matched before a token, |table[m, token]| are after it; n: the template is
    whole. The sign is negative if the match begins in this token. The template's first letter must
    occur in it once, so that a match can begin in one place only."""
    n, by_letter = len(template), defaultdict(list)
    for token, text in enumerate(texts):
        by_letter[text[:1]].append(token)
    begun = torch.tensor([-matched_at_end(text, template) for text in texts], dtype=torch.int8)
    table = begun.repeat(n + 1, 1)
    for m in range(1, n):
        rest = template[m:]
        for token in by_letter[rest[0]] + by_letter[""]:
            text = texts[token]
            if rest.startswith(text):
                table[m, token] = m + len(text)
            elif text.startswith(rest) and is_boundary(text[len(rest):]):
                table[m, token] = n
    return table


def chat_template_of(tokenizer, today: str | None) -> str:
    """The chat template of a tokenizer, with the day `today` (ISO format; None: today) where it
    would print today's: a run that goes on tomorrow keeps its prompts."""
    day = date.fromisoformat(today) if today else date.today()
    try:
        template = tokenizer.get_chat_template()
    except ValueError as e:  # several, and none of them the default
        raise UserError(f"this model's chat template cannot be chosen ({short_error(e)})") from e
    template = CLOCK.sub(lambda call: json.dumps(day.strftime(call[2])), template)
    if "strftime_now(" in template:
        raise UserError("this model's chat template prints the time in a form that is not a"
                        " literal: prompts would change during a run; mend the template")
    return template


class Codec:
    """The tokenizer of a model, with its chat template if it has one.

    The template is "The answer is". As ids, it is `template_at_start` at the start of a reply and
    `template_after_z` after a rationale; `stops` recognises every form of it. `turn_end` closes a
    reply; it and the ids of `eos` end one."""

    def __init__(self, tokenizer, eos: list[int], vocab_size: int | None = None,
                 context: tuple[int, str] = (2**30, ""), today: str | None = None,
                 prompt: str = "{question}", system: str = "", shots: Sequence = ()):
        """`context`: the most tokens of a sequence, and why not more. `today`: the day that a chat
        template prints, in ISO format. `prompt`: what is asked, with "{question}" in it. `system`:
        what precedes it. `shots`: data.Rows, each shown with its rationale and answer."""
        self.tokenizer, self.context = tokenizer, context
        self.user_prompt, self.system, self.shots = prompt, system, shots
        self.chat_template = chat_template_of(tokenizer, today) if tokenizer.chat_template else None
        self.turn_end = self.find_turn_end(eos)
        self.eos = [*dict.fromkeys([*eos, self.turn_end])]
        self.template_at_start = self.opening(TEMPLATE)
        self.template_after_z = self.after(".", " " + TEMPLATE)
        if not (self.template_at_start and self.template_after_z):
            raise UserError(f"this tokenizer does not keep {TEMPLATE!r} apart from what precedes"
                            " it")
        self.stops = stop_table(self.token_texts(vocab_size or len(tokenizer)))

    def token_texts(self, vocab_size: int) -> list[str]:
        """What each token adds to a text; "" for ids that the tokenizer does not have."""
        before = self.template_at_start[-1]
        pairs = [[before, token] for token in range(min(len(self.tokenizer), vocab_size))]
        first, *texts = self.tokenizer.batch_decode([[before], *pairs],
                                                    clean_up_tokenization_spaces=False)
        return [t[len(first):] for t in texts] + [""] * (vocab_size - len(texts))

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def after(self, before: str, text: str) -> list[int]:
        """The ids of `text` after `before`; [] where a token would span both."""
        head, whole = self.ids(before), self.ids(before + text)
        return whole[len(head):] if whole[:len(head)] == head else []

    def opening(self, text: str) -> list[int]:
        """The ids of `text` at the start of a reply; [] as in `after`."""
        return self.after(self.prompt("a"), text if self.chat_template else " " + text)

    def turns(self, question: str, *reply: str) -> list[tuple[str, str]]:
        """(role, content) of a conversation: system, worked examples, a question, and perhaps its
        reply."""
        shown = [(self.user_prompt.replace("{question}", s.question),
                  f"{s.rationale} {TEMPLATE} {s.gold.removesuffix('.')}.") for s in self.shots]
        pairs = [*shown, (self.user_prompt.replace("{question}", question), *reply)]
        said = [turn for pair in pairs for turn in zip(("user", "assistant"), pair)]
        return [("system", self.system), *said] if self.system else said

    def render(self, question: str, *reply: str) -> str:
        """A conversation in the chat template."""
        turns = [dict(role=role, content=text) for role, text in self.turns(question, *reply)]
        try:
            text = self.tokenizer.apply_chat_template(
                turns, chat_template=self.chat_template, add_generation_prompt=not reply,
                tokenize=False)
        except Exception as e:  # a template is a program
            hint = "leave out --system" if self.system else "mend it"
            raise UserError(f"this model's chat template fails ({short_error(e)}); {hint}") from e
        if self.system.strip() not in text:
            raise UserError("this model's chat template leaves --system out; put it into --prompt")
        return text

    def prompt(self, question: str) -> str:
        """What a reply follows."""
        if self.chat_template:
            return self.render(question)
        names = dict(system="", user="Question: ", assistant="Answer: ")
        ends = dict(system="\n\n", user="\n", assistant="\n\n")
        text = "".join(names[role] + said + ends[role] for role, said in self.turns(question))
        return text + "Answer:"

    def find_turn_end(self, eos: list[int]) -> int:
        """The token with which the chat template closes a reply. The first of `eos` if there is no
        template, or it closes none."""
        if not self.chat_template:
            return eos[0]
        special = {*eos, *self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        _, found, tail = self.render("a", REPLY).rpartition(REPLY)
        return next((t for t in self.ids(tail) if t in special), eos[0]) if found else eos[0]

    def example(self, place: str, row) -> Example:
        """A data.Row as an Example. Raises UserError, naming the row, for an answer that could
        never be graded as right, or text that cannot be tokenised by itself."""
        question, gold, rationale = row.question, row.gold, row.rationale
        answer = self.after(TEMPLATE, f" {gold.removesuffix('.')}.") + [self.turn_end]
        reply = self.text(self.template_at_start + answer)
        if not gold or not same_answer(answer_in(reply), gold):
            raise UserError(f"{place}: the answer {gold!r} could never be graded as right: as a"
                            f" reply it reads {reply!r}; mend the row")
        z = self.opening(rationale) if rationale else []
        if rationale and not z:
            raise UserError(f"{place}: the rationale's first token would be part of the prompt;"
                            " mend the row")
        return Example(question, gold, self.prompt_ids(question), answer, z, place, row.options)

    def prompt_ids(self, question: str) -> list[int]:
        """The ids of a prompt. Without a chat template, with BOS if the tokenizer adds one, but
        without the EOS that some add."""
        if self.chat_template:
            return self.ids(self.prompt(question))
        ids = self.tokenizer(self.prompt(question))["input_ids"]
        return ids[:-1] if ids[-1] in self.eos else ids

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


def context_of(config) -> tuple[int, str]:
    """The most tokens of a sequence, and why a longer one is refused."""
    context = max_context(config)
    reason = f"the model's context of {context}"
    if context < config.max_position_embeddings:
        reason += (f" (of its {config.max_position_embeddings} positions; longrope rotates longer"
                   " sequences by other angles, so a token's log-prob would depend on what"
                   " follows)")
    return context, reason


def load_codec(args, prompt: str, shots: Sequence) -> Codec:
    """The codec of --model. Raises UserError where no EOS is known."""
    config = load_config(args)
    tokenizer = load_tokenizer(args, config)
    try:
        eos = transformers.GenerationConfig.from_pretrained(args.model).eos_token_id
    except OSError:
        eos = config.eos_token_id
    eos = [t for t in (*np.atleast_1d(eos).tolist(), tokenizer.eos_token_id) if t is not None]
    if not eos:
        raise UserError(f"--model {args.model}: no EOS in its configuration or tokenizer; set one")
    return Codec(tokenizer, eos, config.vocab_size, context_of(config), args.date, prompt,
                 args.system or "", shots)
