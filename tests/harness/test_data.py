"""Proves that real rows become questions and that token ids are those the tokenizer itself writes.

There is one BOS, templates are whole, and no mask is guessed from an id. Answers are compared as a
reader would compare them.
"""

import json
from copy import copy
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from tokenizers import (
    Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers)
from transformers import (
    AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast)

import latro
from conftest import ROOT, TOY
from harness import answers, data, distributed, errors

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
        question, gold, rationale = (text.strip() for text in data.TASKS[task](row))
        assert row["question"].strip() in question and gold
        assert question.endswith("Let's think step by step.")
        assert answers.same_answer(f" {gold}.", gold)
        if task == "gsm8k":
            assert row["answer"].endswith(f"#### {gold}") and rationale
            assert not any(mark in rationale for mark in ("<<", ">>", "####"))
            assert not answers.same_answer(f"{gold}1", gold)
        else:
            options = dict(zip(row["choices"]["label"], row["choices"]["text"]))
            assert gold == options[row["answerKey"]].strip()
            assert all(o in question for o in options.values())
            others = {o.casefold().strip(" .") for o in options.values()}
            others.discard(gold.casefold().strip(" ."))
            assert not any(answers.same_answer(o, gold) for o in others), row


def test_gsm8k_rationale_reads_as_text():
    row = dict(question="How many?", answer="He has 48/2 = <<48/2=24>>24 clips.\n#### 1,024")
    assert [t.strip() for t in data.gsm8k(row)] == [
        "How many? Let's think step by step.", "1,024", "He has 48/2 = 24 clips."]


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


# ---- plain prompts

@pytest.fixture(scope="module")
def toy():
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    return data.Codec(tokenizer, "toy", [tokenizer.eos_token_id])


def test_plain_prompt_and_answer(toy):
    decode = toy.tokenizer.decode
    example = toy.example("here", dict(question=" How many cookies are left? ", answer="18"))
    assert decode(example.x) == "Question: How many cookies are left?\nAnswer:"
    assert decode(example.answer) == " 18.<eos>"
    assert example.answer[-1] == toy.turn_end == toy.eos[0]
    assert example.question == "How many cookies are left?"
    assert (example.gold, example.z) == ("18", [])
    row = dict(question="How many?", answer="3", rationale="Monday 1 + 2 = 3.")
    example = toy.example("here", row)
    assert decode(example.z) == " Monday 1 + 2 = 3."


def test_templates_are_those_that_models_write(toy):
    """Released-code defect 9: " The answer is" and "The answer is" tokenise differently."""
    decode = toy.tokenizer.decode
    assert decode(toy.template_after_z) == decode(toy.template_at_start) == " The answer is"
    assert [decode(s) for s in toy.stops] == [" The answer is"]  # one form of each word
    reply = toy.tokenizer("Monday 1 + 2 = 3. The answer is 3.")["input_ids"]
    assert any(list(s) == reply[i:i + len(s)] for s in toy.stops for i in range(len(reply)))


def test_answer_ends_with_one_period(toy):
    """No second period is added to an answer that is a sentence."""
    example = toy.example("here", dict(question="How many?", answer="They run away."))
    assert toy.tokenizer.decode(example.answer[:-1]).count(".") == 1


# ---- chat templates

CHAT = ("{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}")
SPECIAL = ["<unk>", "<s>", "</s>", "<|end|>", "<|user|>", "<|assistant|>"]


def tokenizer_of_bytes(chat_template=None, regex=True):
    """Byte-level BPE that adds BOS to every text, as Llama's does."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    bpe.decoder = decoders.ByteLevel()
    text = "Question: how many are left?\nAnswer: 5 + 1 = 6.\nThe answer is 6. The answer is 18."
    bpe.train_from_iterator([text] * 9, trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>", chat_template=chat_template)


def test_chat_prompt_comes_straight_from_the_template():
    """Released-code defect 9: it tokenises the rendered template, which adds a second BOS."""
    tokenizer = tokenizer_of_bytes(CHAT)
    codec = data.Codec(tokenizer, "qa", [2, 3])
    row = dict(question="How many?", answer="18", rationale="5 + 1 = 6.")
    example = codec.example("here", row)
    asked = [dict(role="user", content="How many?")]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    assert example.x == prompt
    assert prompt[0] == tokenizer.bos_token_id and prompt.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(prompt) == "<s><|user|>\nHow many?<|end|>\n<|assistant|>\n"
    assert tokenizer.decode(example.answer) == " 18.<|end|>"  # not </s>: the template's turn end
    assert tokenizer.decode(example.z) == "5 + 1 = 6."
    reply = f"5 + 1 = 6.{tokenizer.decode(codec.template_after_z)} 18."
    whole = [*asked, dict(role="assistant", content=reply)]
    whole = tokenizer.apply_chat_template(whole)["input_ids"]
    assert reply.split() == "5 + 1 = 6. The answer is 18.".split()
    ours = example.x + example.z + codec.template_after_z + example.answer
    assert ours == whole[:-1]  # all except the last newline


def test_chat_templates_stop_in_every_form():
    tokenizer = tokenizer_of_bytes(CHAT)
    codec = data.Codec(tokenizer, "qa", [3])
    assert tokenizer.decode(codec.template_at_start) == "The answer is"
    assert {tokenizer.decode(s).strip() for s in codec.stops} == {"The answer is"}
    for before in ("", "5. ", "5.\n", "5.\n\n", "5"):
        reply = f"{before}The answer is 6"
        ids = tokenizer(reply, add_special_tokens=False)["input_ids"]
        ends = [i for s in codec.stops for i in range(len(ids)) if ids[:i][-len(s):] == list(s)]
        assert ends and tokenizer.decode(ids[:min(ends)]).endswith("The answer is"), reply


def test_plain_prompt_has_one_bos():
    tokenizer = tokenizer_of_bytes()
    codec = data.Codec(tokenizer, "qa", [2])
    example = codec.example("here", dict(question="How many?", answer="18"))
    assert tokenizer.decode(example.x) == "<s>Question: How many?\nAnswer:"
    assert tokenizer.decode(example.answer) == " 18.</s>"


def test_tokenizer_that_merges_words_is_refused():
    """Without splitting at words, BPE learns tokens that belong to both z and y."""
    with pytest.raises(errors.UserError, match="tokenizer"):
        data.Codec(tokenizer_of_bytes(regex=False), "qa", [2])


def test_every_eos_of_the_model_counts(tmp_path):
    """Released-code defect 13: it looks up end tokens by hub name. Here they come from the model's
    own files: two from the generation config, another from the tokenizer."""
    tokenizer = tokenizer_of_bytes(CHAT)
    tokenizer.save_pretrained(tmp_path)
    LlamaConfig(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    GenerationConfig(eos_token_id=[5, 3]).save_pretrained(tmp_path)
    row = json.dumps(dict(question="How many?", answer="18")) + "\n"
    (tmp_path / "train.jsonl").write_text(row * 3)
    args = latro.parse(["--model", str(tmp_path), "--task", "qa", "--data", str(tmp_path)])
    codec, _, _ = data.load_datasets(args)
    assert set(codec.eos) == {2, 3, 5} and codec.turn_end == 3


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
    together = latro.sample_rationales(policy, PROMPTS, [[8, 9, 10]], [1], 1, 20, None)
    for x, (ids, *_) in zip(PROMPTS, together, strict=True):
        x = torch.tensor([x])
        theirs = plain.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=20,
                                do_sample=False)
        assert ids == theirs[0, x.shape[1]:].tolist()[:len(ids)] and ids


def test_a_period_and_a_newline_in_one_token():
    """Tokenizers with Llama 3's or Qwen's pattern have a token ".\\n". A template cannot begin
    inside it, and need not: the text after it ends with the template without a leading space."""
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
               r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<eos>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(["It is 3.\nThe answer is 4. The answer is 5.\n\n"] * 50, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")
    codec = data.Codec(tokenizer, "qa", [0])
    for before in ("3.\n", "3. ", "3\n", "3\n\n", ""):
        ids = tokenizer(f"{before}The answer is")["input_ids"]
        assert any(ids[-len(s):] == list(s) for s in codec.stops), before
    assert tokenizer.decode(tokenizer("It is 3.\n")["input_ids"][-1:]) == ".\n"
    assert tokenizer.decode(codec.template_after_z) == " The answer is"


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
        codec = copy(toy)
        codec.task = task
        try:
            example = codec.example("here:1", row)
            assert example.gold.strip() and example.place == "here:1"
            assert example.answer[-1] == codec.turn_end
        except errors.UserError as problem:
            assert str(problem).startswith("here:1: ")
    check_file()
    check_row()
