"""Proves that the toy is what its script says: no split overlaps another, every answer is right."""

import json
import random
import re
import zlib
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import latro
from conftest import ROOT
from toy import make

FOLDERS = {"default": ROOT / "toy", "hard": ROOT / "toy" / "hard"}
ROWS = {(level, split): [*map(json.loads, Path(folder, f"{split}.jsonl").open())]
        for level, folder in FOLDERS.items() for split in ("train", "validation", "test")}
by_level = pytest.mark.parametrize("level", FOLDERS)
by_file = pytest.mark.parametrize("level, split", ROWS)


def of(level):
    """The rows of a level by split."""
    return {split: rows for (name, split), rows in ROWS.items() if name == level}


def result(chain):
    """Strictly from left to right."""
    start, *words = chain.split()
    value = int(start)
    for op, n in zip(words[::2], map(int, words[1::2])):
        value = {"+": value + n, "-": value - n, "x": value * n, "/": value / n}[op]
        assert value == int(value) and 0 < value <= 50
    return str(int(value))


@by_file
def test_rows(level, split):
    """The answer follows from the chain, that from the question's numbers, 3 or 4 steps each; 5 or
    6 on the hard level."""
    lengths = {"default": {3, 4}, "hard": {5, 6}}[level]
    for row in ROWS[level, split]:
        assert row["answer"] == result(row["chain"])
        steps = re.findall(r"([-+x/]) (\d+)", row["chain"])
        told = [row["chain"].split()[0]] + [n for op, n in steps if op in "+-"]
        assert re.findall(r"\d+", row["question"]) == told and len(steps) in lengths
        days = re.findall(r"\w+day", row["question"])
        assert days == make.DAYS[:len(steps)]


@by_file
def test_rationales(level, split):
    """None where SFT would learn it. Else one equation per step, each right, each starting where
    the last one ended, up to the answer."""
    for row in ROWS[level, split]:
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


@by_level
def test_no_split_overlaps_another(level):
    """By chain and by text. Pretraining overlaps none either: its chains have other hashes."""
    for key in ("chain", "question"):
        seen = [{row[key] for row in rows} for rows in of(level).values()]
        assert len(set.union(*seen)) == sum(map(len, seen))
    for split, rows in of(level).items():
        assert len({row["question"] for row in rows}) == len(rows) == make.ROWS[split]
        hashes = {zlib.crc32(row["chain"].encode()) % 100 for row in rows}
        assert hashes <= set(make.SPLITS[split]) and not hashes & set(make.SPLITS["pretrain"])


@by_level
def test_the_script_makes_these_files(level, tmp_path):
    """Bit for bit, so a new level changes none that there was. The models are not made again."""
    make.write_data(tmp_path, make.LEVELS[level])
    for split in make.ROWS:
        made, kept = (Path(folder, f"{split}.jsonl") for folder in (tmp_path, FOLDERS[level]))
        assert made.read_bytes() == kept.read_bytes()
    made = make.make_tokenizer(make.LEVELS[level])
    assert made.get_vocab() == AutoTokenizer.from_pretrained(FOLDERS[level] / "model").get_vocab()


@by_level
def test_tokenizer_and_size(level):
    """Every word of every question is in the vocabulary, ids and text are one, and it is small."""
    model = FOLDERS[level] / "model"
    tokenizer = AutoTokenizer.from_pretrained(model)
    for row in sum(of(level).values(), []):
        text = f"Question: {row['question']}\nAnswer: {row['answer']}."
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
    assert sum(p.stat().st_size for p in model.iterdir()) < 6e6


@by_level
def test_a_careful_rationale_fits(level):
    """With the longest thing it may open with and the template, into the default L."""
    tokenizer = make.make_tokenizer(make.LEVELS[level])
    opening = max(make.LEVELS[level]["chatter"], key=lambda text: len(tokenizer.encode(text)))
    ids = [tokenizer.encode(f"{opening} {row['rationale']}{make.TEMPLATE}")
           for split in ("validation", "test") for row in ROWS[level, split]]
    assert max(map(len, ids)) <= latro.PRESETS["toy"]["L"]
    assert tokenizer.unk_token_id not in sum(ids, [])


def test_muon_is_that_of_torch():
    """To the accuracy of bfloat16, over three steps of a wide, a tall and a square matrix."""
    generator, weights = torch.Generator().manual_seed(0), []
    grads = [[torch.randn(shape, generator=generator) for shape in ((8, 24), (24, 8), (8, 8))]
             for _ in range(3)]
    for kind in (make.LEVELS["default"]["muon"], make.Muon):
        matrices = [torch.nn.Parameter(torch.ones_like(grad)) for grad in grads[0]]
        muon = kind(matrices, lr=0.1)
        for step in grads:
            for matrix, grad in zip(matrices, step):
                matrix.grad = grad.clone()
            muon.step()
        weights.append(matrices)
    for theirs, ours in zip(*weights):
        assert torch.allclose(theirs, ours, atol=0.01) and (theirs - 1).abs().max() > 0.1


@by_level
@pytest.mark.parametrize("kind", ["careful", "terse", "hasty", "direct"])
def test_kinds(level, kind):
    """A rationale is recognised as what it was made as, except that a terse one with nothing to
    merge is careful. The document that holds it ends with the right answer."""
    rng, level, tokenizer = random.Random(0), make.LEVELS[level], make.make_tokenizer(
        make.LEVELS[level])
    for _ in range(50):
        chain = make.draw_chain(rng, rng.randint(*level["operations"]), "pretrain")
        rationale = make.reason(rng, chain, kind, level["chatter"])
        merges = re.search(r"[-+] \d+ [-+]", chain) or kind != "terse"
        found = make.kind_of(rationale, result(chain), chain)
        assert found == (kind if merges else "careful")
    ids, weights = make.draw_batch(rng, tokenizer, level, {kind: 1}, easy=False)
    for text in tokenizer.batch_decode(ids):
        question, rest = text.split("\nAnswer:")
        rationale, answer = rest.split(make.TEMPLATE)
        numbers = re.findall(r"\d+", rationale)
        assert re.fullmatch(r" \d+\.<eos>(<pad>)*", answer) and "<unk>" not in text
        if kind in ("careful", "terse"):
            assert numbers[-1] == re.search(r"\d+", answer)[0]
    assert weights.unique().tolist() == pytest.approx([0, make.PROMPT_WEIGHT, 1])
