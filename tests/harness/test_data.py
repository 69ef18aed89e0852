"""Proves that real rows become questions, that no training row is held out, and that no mask is
guessed from an id. Answers are compared as a reader would compare them.
"""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

import latro
from conftest import ROOT, TOY, stops_of, write_rows
from harness import answers, data, distributed, errors
from harness.codec import Codec

DATA = ROOT.parent / "shared" / "data"  # the two data sets, if present
FILES = [("gsm8k", "train", 7473), ("gsm8k", "test", 1319), ("arc_challenge", "train", 1119),
         ("arc_challenge", "test", 1172)]


# ---- grading

@pytest.mark.parametrize("said, gold, right", [
    ("1,200.", "1200", True), ("1200", "1,200", True), ("$5.00", "5", True),
    ("$1,200.00", "1200", True), ("18 dollars", "18", True),
    ("2*3=6", "6", True), ("2*3=6", "2", False), ("5 - 3 = 2.", "2", True),
    ("\u22123", "-3", True), ("-3", "\u22123", True), ("3", "-3", False), ("-$5", "-5", True),
    ("50%", "50", True), ("1/2", "0.5", True), ("0.5", "1/2", True), (".5", "0.5", True),
    ("3.0", "3", True), ("3.5", "3", False), ("180", "18", False), ("18", "180", False),
    ("", "18", False), ("unknown", "18", False), ("=", "18", False), (".", "18", False),
    ("1/0", "7", False), ("7", "1/0", False), ("1.5/2", "7", False), (".5/2", "7", False),
    ("9" * 5000, "9", False),
    ("9.8 m/s", "9.8 m/s.", True), ("9.8 m/s.", "9.8 m/s", True), ("9.8", "9.8 m/s", False),
    ("salt water", "water", False), ("water", "salt water", False), ("Water.", "water", True),
    ("salt  water", "salt water", True), ("", "water", False),
])  # fmt: skip
def test_same_answer(said, gold, right):
    """Released-code defect 11: it accepts "salt water" for "water", and rejects "9.8 m/s" for
    itself and "2*3=6" for 6. No text raises an error."""
    assert answers.same_answer(said, gold) is right


@pytest.mark.parametrize("reply, said", [
    ("5 + 1 = 6. The answer is 6.", "6."), ("The answer is 6.\nThe end", "6."),
    ("The answer is 5. No. The answer is 6.", "6."), ("5 + 1 = 6.", ""), ("The answer is", ""),
    ("", ""),
])  # fmt: skip
def test_answer_in(reply, said):
    assert answers.answer_in(reply) == said


# ---- real rows

@pytest.mark.parametrize("task, split, count", FILES)
def test_real_rows(task, split, count):
    if not (DATA / task / f"{split}.jsonl").exists():
        pytest.skip(f"{DATA / task} is not there")
    args = latro.parse(["--model", str(TOY), "--task", task, "--data", str(DATA / task)])
    read = data.read_rows(args, split)
    assert len(read) == count
    for _, row in read:
        question, gold, rationale, options = data.parse_row("here", row, task)
        assert row["question"].strip() in question and gold
        assert answers.same_answer(f" {gold}.", gold)
        if task == "gsm8k":
            assert row["answer"].endswith(f"#### {gold}") and rationale
            assert not any(mark in rationale for mark in ("<<", ">>", "####"))
            assert not answers.same_answer(f"{gold}1", gold)
        else:
            labels = dict(zip(row["choices"]["label"], row["choices"]["text"]))
            assert gold == labels[row["answerKey"]].strip() and options == (*labels.values(),)
            assert all(o in question for o in options)
            others = {o.casefold().strip(" .") for o in options}
            others.discard(gold.casefold().strip(" ."))
            assert not any(answers.same_answer(o, gold) for o in others), row


def test_gsm8k_rationale_reads_as_text():
    row = dict(question="How many?", answer="He has 48/2 = <<48/2=24>>24 clips.\n#### 1,024")
    assert data.parse_row("here", row, "gsm8k") == (
        "How many?", "1,024", "He has 48/2 = 24 clips.", ())


def test_rows_are_lines_whatever_they_contain(tmp_path):
    """Only "\\n" ends a line; Unicode's other line separators are ordinary characters."""
    texts = ["one\u2028two", "one\u0085two", "one\u2029two", "\u00e9\u4e00"]
    lines = [json.dumps(dict(question=t, answer="3"), ensure_ascii=False) for t in texts]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    args = latro.parse(["--model", str(TOY), "--task", "qa", "--data", str(tmp_path)])
    assert [row["question"] for _, row in data.read_rows(args, "train")] == texts


@pytest.mark.parametrize("task, config, row", [
    ("gsm8k", "main", dict(question="1 + 1?", answer="1 + 1 = <<1+1=2>>2\n#### 2")),
    ("arc_challenge", "ARC-Challenge", dict(
        id="a", question="Wet?", answerKey="B",
        choices=dict(text=["sand", "sea"], label=["A", "B"]))),
])
def test_rows_of_the_hub(task, config, row, toy, tmp_path, monkeypatch):
    """Reads the same rows through `datasets` if --data is no directory, without network access."""
    datasets = pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.chdir(tmp_path)
    load, asked = datasets.load_dataset, []

    def load_locally(*name_and_config):
        asked.append(name_and_config)
        return load("json", data_files=dict(train="train.jsonl"), cache_dir="cache")
    monkeypatch.setattr(datasets, "load_dataset", load_locally)
    args = latro.Args(task=task, data="some/name")
    [(place, found)] = data.read_rows(args, "train")
    assert asked == [("some/name", config)] and place == "some/name train 0"
    assert data.TASKS[task](found) == data.TASKS[task](row)
    assert data.read_rows(args, "validation") == []
    if "id" in row:
        (tmp_path / "train.jsonl").write_text(2 * (json.dumps(row) + "\n"))
        with pytest.raises(errors.UserError, match="train 1: .* 'a' is that of some/name train 0"):
            data.read_rows(args, "train")


@pytest.fixture(scope="module")
def toy():
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    return Codec(tokenizer, [tokenizer.eos_token_id])


def test_a_training_row_that_is_held_out_is_left_out(tmp_path, capsys):
    """By content: the same row may stand twice, under two ids or none."""
    made = write_rows(tmp_path, n=32)
    write_rows(tmp_path, split="validation", n=2)  # repeats the first two
    lines = [json.dumps(row | dict(id=i)) for i, row in enumerate([*made, made[5]])]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    args = latro.parse(["--data", str(tmp_path), "--task", "qa", "--model", str(TOY), "--L", "32"])
    _, train_set, held_out = data.load_datasets(args)
    assert [e.question for e in held_out] == [row["question"] for row in made[:2]]
    assert [e.question for e in train_set] == [r["question"] for r in [*made[2:], made[5]]]
    assert "2 training rows ask a held-out question: left out" in capsys.readouterr().out
    (tmp_path / "validation.jsonl").unlink()
    _, train_set, held_out = data.load_datasets(args)  # 2 of 33: the last, and its repeat in train
    assert [e.question for e in held_out] == [made[31]["question"], made[5]["question"]]
    assert len(train_set) == 30 and "1 training rows" in capsys.readouterr().out
    (tmp_path / "train.jsonl").write_text(2 * (json.dumps(made[0]) + "\n"))
    with pytest.raises(errors.UserError, match="2 rows or more that are not held out"):
        data.load_datasets(args)


def test_worked_examples_are_not_trained_on(tmp_path):
    """The first rows of train that have a rationale."""
    made = write_rows(tmp_path, n=20)
    for i in (1, 3, 4):
        made[i]["rationale"] = f"On Monday {i + 3} + 2 = {i + 5}."
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    flags = ["--data", str(tmp_path), "--task", "qa", "--model", str(TOY), "--L", "32"]
    codec, train_set, held_out = data.load_datasets(latro.parse([*flags, "--shots", "2"]))
    asked = [example.question for example in train_set + held_out]
    assert asked == [row["question"] for i, row in enumerate(made) if i not in (1, 3)]
    for example in train_set + held_out:
        text = codec.tokenizer.decode(example.x)
        assert text.count("Question:") == 3 and text.endswith("Answer:")
        assert f"Answer: {made[1]['rationale']} The answer is 6." in text
    with pytest.raises(errors.UserError, match="--shots 4: only 3 rows of .* have a rationale"):
        data.load_datasets(latro.parse([*flags, "--shots", "4"]))


@pytest.mark.parametrize("task, asked", [
    ("gsm8k", "Wet? Let's think step by step."),
    ("arc_challenge", "Wet?\n- sand\n- sea\nLet's think step by step."), ("qa", "Wet?")])
def test_default_prompts(task, asked, monkeypatch):
    """Also of a run that was started before --prompt existed."""
    row = dict(gsm8k=dict(question="Wet?", answer="#### 1"), qa=dict(question="Wet?", answer="1"),
               arc_challenge=dict(question="Wet?", answerKey="B",
                                  choices=dict(text=["sand", "sea"], label=["A", "B"])))[task]
    monkeypatch.setattr(data, "read_rows", lambda args, split: [("here", row)])
    flags = ["--task", task, "--model", str(TOY), "--data", "here"]
    plain = asked.removesuffix("Let's think step by step.").rstrip()
    for prompt in ([], ["--prompt", "{question}"]):
        args = latro.parse([*flags, *prompt])
        args.prompt = args.prompt if prompt else None
        codec, [(place, row)] = data.load_codec_and_train_rows(args)
        said = codec.turns(data.parse_row(place, row, task).question)
        assert said == [("user", plain if prompt else asked)]


def test_an_id_of_null_is_no_id(tmp_path):
    write_rows(tmp_path, id=None)
    args = latro.parse(["--data", str(tmp_path), "--task", "qa", "--model", str(TOY)])
    assert len(data.read_rows(args, "train")) == 20


# ---- masks do not depend on ids

@pytest.fixture
def policy():
    device = distributed.init_distributed()
    yield latro.load_model(latro.parse([]), device, torch.float32, latro.logprobs)
    dist.destroy_process_group()


PROMPTS = [[3, 4, 0, 1, 30, 0, 6, 7, 4], [0, 0, 1, 4], [1, 5, 24, 30, 0]]  # 0 pads, 1 is EOS


def test_pad_and_eos_inside_a_row_are_ordinary_tokens(policy):
    """Released-code defect 13: it builds masks by comparing ids with pad and EOS."""
    plain = AutoModelForCausalLM.from_pretrained(TOY)
    group = [latro.Rationale([], [24, 0, 1, 30], 4, [0, 31, 1], 4, False),
             latro.Rationale([], [1], 0, [8, 9, 10, 0, 1], 0, False)]  # EOS at once: y follows x
    tree = latro.pack_tree(PROMPTS, [group] * len(PROMPTS), 1.0, policy)
    with torch.no_grad():
        ours, theirs = policy.logprobs(tree), []
        for x in PROMPTS:
            for rationale in group:
                prefix = x + rationale.actions[:rationale.context]
                for before, after in ((x, rationale.actions), (prefix, rationale.y)):
                    ids = torch.tensor([before + after])
                    logp = plain(ids, attention_mask=torch.ones_like(ids)).logits[0].log_softmax(-1)
                    theirs += [logp[len(before) - 1 + i, t] for i, t in enumerate(after)]
    torch.testing.assert_close(ours, torch.stack(theirs), rtol=0, atol=1e-4)


def test_pad_and_eos_inside_a_prompt_do_not_change_its_continuation(policy):
    plain = AutoModelForCausalLM.from_pretrained(TOY)
    stops = stops_of(policy.vocab_size, [8, 9, 10])
    together = latro.sample_rationales(policy, PROMPTS, stops, [1], 1, 20,
                                        torch.full((len(PROMPTS), 20), math.nan))
    for x, (ids, *_) in zip(PROMPTS, together, strict=True):
        x = torch.tensor([x])
        theirs = plain.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=20,
                                do_sample=False)
        assert ids == theirs[0, x.shape[1]:].tolist()[:len(ids)] and ids


def test_any_bytes_and_any_json(toy, tmp_path):
    """Any file gives rows or a UserError; any row gives an example or a UserError."""
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st
    text = st.text() | st.sampled_from(["question", "answer", "####", "#### 7", "\ud800", "A"])
    leaf = st.none() | st.booleans() | st.integers() | st.floats() | text
    anything = st.recursive(leaf, lambda inner: st.lists(inner, max_size=4)
                            | st.dictionaries(text, inner, max_size=4), max_leaves=8)
    named = st.fixed_dictionaries({}, optional=dict.fromkeys(
        ("question", "answer", "rationale", "choices", "answerKey", "id"), anything))
    choices = st.fixed_dictionaries(dict(text=st.lists(text, max_size=3),
                                         label=st.lists(text, max_size=3)))
    arc = st.fixed_dictionaries(dict(question=text, choices=choices, answerKey=text))
    path = tmp_path / "train.jsonl"
    settings = hypothesis.settings(max_examples=300, deadline=None)

    @settings
    @hypothesis.given(st.lists(st.binary() | anything.map(lambda v: json.dumps(v).encode())))
    def check_file(lines):
        path.write_bytes(b"\n".join(lines))
        try:
            rows = data.read_rows(SimpleNamespace(data=str(tmp_path), task="qa"), "train")
            assert all(place.startswith(f"{path}:") for place, _ in rows)
        except errors.UserError as problem:
            assert str(problem).startswith(f"{path}:")

    @settings
    @hypothesis.given(anything | named | arc, st.sampled_from([*data.TASKS]))
    def check_row(row, task):
        try:
            example = toy.example("here:1", data.parse_row("here:1", row, task))
            assert example.gold.strip() and example.place == "here:1"
            assert example.answer[-1] == toy.turn_end
        except errors.UserError as problem:
            assert str(problem).startswith("here:1: ")
    check_file()
    check_row()
