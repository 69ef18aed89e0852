"""Proves that the toy is what its script says: no split overlaps another, every answer is right."""

import json
import re
import zlib
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from conftest import ROOT, TOY
from toy import make

SPLITS = {split: [*map(json.loads, Path(ROOT, "toy", f"{split}.jsonl").open())]
          for split in ("train", "validation", "test")}


def result(chain):
    """Strictly from left to right."""
    start, *words = chain.split()
    value = int(start)
    for op, n in zip(words[::2], map(int, words[1::2])):
        value = {"+": value + n, "-": value - n, "x": value * n, "/": value / n}[op]
        assert value == int(value) and 0 < value <= 50
    return str(int(value))


@pytest.mark.parametrize("split", SPLITS)
def test_rows(split):
    """The answer follows from the chain, that from the question's numbers, 3 or 4 steps each."""
    for row in SPLITS[split]:
        assert row["answer"] == result(row["chain"])
        steps = re.findall(r"([-+x/]) (\d+)", row["chain"])
        told = [row["chain"].split()[0]] + [n for op, n in steps if op in "+-"]
        assert re.findall(r"\d+", row["question"]) == told and len(steps) in (3, 4)


@pytest.mark.parametrize("split", SPLITS)
def test_rationales(split):
    """None where SFT would learn it. Else one equation per step, each right, each starting where
    the last one ended, up to the answer."""
    for row in SPLITS[split]:
        assert ("rationale" in row) == (split != "train")
        if split == "train":
            continue
        said = re.findall(r"(\w+day) (\d+) ([-+x/]) (\d+) = (\d+)\.", row["rationale"])
        assert row["rationale"] == " ".join(f"{d} {a} {op} {n} = {b}." for d, a, op, n, b in said)
        days, starts, signs, numbers, ends = zip(*said)
        assert days == tuple(make.DAYS[:len(days)])
        assert [*starts, ends[-1]] == [row["chain"].split()[0], *ends]
        assert all(result(f"{a} {op} {n}") == b for _, a, op, n, b in said)
        assert row["chain"].split()[1:] == [w for pair in zip(signs, numbers) for w in pair]
        assert ends[-1] == row["answer"]


def test_no_split_overlaps_another():
    """By chain and by text. Pretraining overlaps none either: its chains have other hashes."""
    for key in ("chain", "question"):
        seen = [{row[key] for row in rows} for rows in SPLITS.values()]
        assert len(set.union(*seen)) == sum(map(len, seen))
    for split, rows in SPLITS.items():
        assert len({row["question"] for row in rows}) == len(rows) == make.ROWS[split]
        hashes = {zlib.crc32(row["chain"].encode()) % 100 for row in rows}
        assert hashes <= set(make.SPLITS[split]) and not hashes & set(make.SPLITS["pretrain"])


def test_tokenizer_and_size():
    """Every word of every question is in the vocabulary, ids and text are one, and it is small."""
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    for row in sum(SPLITS.values(), []):
        text = f"Question: {row['question']}\nAnswer: {row['answer']}."
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
    assert sum(p.stat().st_size for p in TOY.iterdir()) < 6e6
