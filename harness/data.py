"""What a data set asks: rows -> questions, gold answers and gold rationales.

GSM8K {question, answer: "... #### N"} and ARC-Challenge {question, choices: {text, label},
answerKey} are as on the hub. Any other JSONL has {question, answer} and perhaps a rationale.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

from .codec import Codec, Example, load_codec
from .distributed import all_gather_list, print0
from .errors import UserError, short_error


# ------------------------------------------------------------------------------ rows
class Row(NamedTuple):
    """A row of a data set, as text."""

    question: str  # with its options
    gold: str
    rationale: str = ""  # "" without one
    options: tuple[str, ...] = ()  # that the question offers


def gsm8k(row: dict) -> Row:
    steps, gold = row["answer"].rsplit("####", 1)
    return Row(row["question"], gold, re.sub("<<.*?>>", "", steps))


def arc_challenge(row: dict) -> Row:
    options = dict(zip(row["choices"]["label"], row["choices"]["text"], strict=True))
    lines = [row["question"], *(f"- {o}" for o in options.values())]
    return Row("\n".join(lines), options[row["answerKey"]], "", (*options.values(),))


def qa(row: dict) -> Row:
    return Row(row["question"], row["answer"], row.get("rationale", ""))


TASKS = {"gsm8k": gsm8k, "arc_challenge": arc_challenge, "toy": qa, "qa": qa}
PROMPTS = {"gsm8k": "{question} Let's think step by step.", "toy": "{question}", "qa": "{question}",
           "arc_challenge": "{question}\nLet's think step by step."}
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
    if not path.exists():
        return []
    with path.open("rb") as file:
        for i, line in enumerate(file, 1):
            try:
                rows.append((f"{path}:{i}", json.loads(line)))
            except (ValueError, RecursionError) as e:
                raise UserError(f"{path}:{i}: not JSON in UTF-8; every line is one object") from e
    return check_unique(rows)


def check_unique(rows: list[tuple[str, dict]]) -> list[tuple[str, dict]]:
    """The rows. Raises UserError where two have the same "id": a file was included twice."""
    first_place = {}
    for place, row in rows:
        known = isinstance(row, dict) and row.get("id") is not None
        name = repr(row["id"]) if known else place
        first = first_place.setdefault(name, place)
        if first != place:
            raise UserError(f"{place}: the id {name} is that of {first} too; leave one of them out")
    return rows


# ------------------------------------------------------------------------------ token ids
def parse_row(place: str, row: dict, task: str) -> Row:
    """A line of a data set as a Row. Raises UserError, naming it, where a field is missing."""
    try:
        question, gold, rationale, options = TASKS[task](row)
        texts = [text.strip() for text in (question, gold, rationale)]
        "".join(texts).encode()  # half a surrogate pair is JSON, but not text
        return Row(*texts, options)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{place}: not a row of --task {task} ({short_error(e)})") from e


def take_shots(rows: list[tuple[str, dict]], args) -> tuple[list[Row], list[tuple[str, dict]]]:
    """The first --shots training rows that have a rationale, as worked examples, and the others:
    what the prompt shows is neither trained on nor graded. Raises UserError if there are too
    few."""
    shots, others = [], []
    for place, row in rows:
        parsed = parse_row(place, row, args.task) if len(shots) < args.shots else None
        if parsed and parsed.rationale:
            shots.append(parsed)
        else:
            others.append((place, row))
    if len(shots) < args.shots:
        raise UserError(f"--shots {args.shots}: only {len(shots)} rows of {args.data} train have a"
                        " rationale to show")
    return shots, others


def load_codec_and_train_rows(args) -> tuple[Codec, list[tuple[str, dict]]]:
    """The codec, whose prompts show the worked examples, and the training rows without these."""
    shots, rows = take_shots(read_rows(args, "train"), args)
    return load_codec(args, args.prompt or PROMPTS[args.task], shots), rows


def encode(codec: Codec, rows: list[tuple[str, dict]], args) -> list[Example]:
    """Rows as token ids. Raises UserError for a row that the model's context cannot hold."""
    examples = [codec.example(place, parse_row(place, row, args.task)) for place, row in rows]
    context, reason = codec.context
    for e in examples:
        needed = len(e.x) + max(args.L, len(e.z)) + len(codec.template_after_z + e.answer)
        if needed > context:
            raise UserError(f"{e.place}: {len(e.x)} tokens of prompt, --L {args.L} and an answer"
                            f" exceed {reason}; lower --L or drop the row")
    return examples


def load_datasets(args) -> tuple[Codec, list[Example], list[Example]]:
    """(codec, training questions, held-out questions). Checks everything that needs no weights.

    Without a validation split the last sixteenth of train is held out. A training row that asks a
    held-out question is left out. The test split is never read: whoever looks at it while training
    selects by it."""
    args.date, *_ = all_gather_list([args.date])  # the same prompts on every rank at midnight too
    codec, rows = load_codec_and_train_rows(args)
    held_out = read_rows(args, "validation")
    if not held_out:
        n = max(1, len(rows) // 16)
        rows, held_out = rows[:-n], rows[-n:]
    train_set, held_out = (encode(codec, r, args) for r in (rows, held_out[:args.eval_questions]))
    known = {example.question for example in held_out}
    unseen = [example for example in train_set if example.question not in known]
    if not unseen:
        raise UserError(f"--data {args.data}: needs a train split of 2 rows or more that are not"
                        " held out")
    if len(unseen) < len(train_set):
        print0(f"{len(train_set) - len(unseen)} training rows ask a held-out question: left out")
    return codec, unseen, held_out
