"""Proves that token ids are those the tokenizer itself writes, and that every template stops z.

There is one BOS, templates are whole, and a template is recognised however the tokenizer cuts it.
"""

import json
import random
from datetime import date
from types import SimpleNamespace

import pytest
from tokenizers import (
    Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers)
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

import latro
import real_tokenizers
from conftest import TOY
from harness import data, errors
from harness.answers import TEMPLATE
from harness.codec import Codec, context_of, stop_table
from harness.data import Row

SPECIAL = ["<unk>", "<s>", "</s>", "<|end|>", "<|user|>", "<|assistant|>"]
CHAT = ("{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}")


def tokenizer_of_bytes(chat_template=None, regex=True, end="$A", normalizer=None):
    """Byte-level BPE that adds BOS to every text, as Llama's does. `end`: what it puts after it."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    bpe.decoder = decoders.ByteLevel()
    if normalizer:
        bpe.normalizer = normalizer
    text = "Question: how many are left?\nAnswer: 5 + 1 = 6.\nThe answer is 6. The answer is 18."
    bpe.train_from_iterator([text] * 9, trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.post_processor = processors.TemplateProcessing(
        f"<s> {end}", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>", chat_template=chat_template)


def first_stop(codec, ids):
    """How many of these tokens z and its template take, and how many the template; None for none.
    As latro.StopCriteria, in plain Python."""
    matched = tokens = 0
    for i, token in enumerate(ids, 1):
        entry = int(codec.stops[matched, token])
        matched, tokens = abs(entry), 1 if entry < 0 else tokens + 1
        if matched == len(TEMPLATE):
            return i, tokens
    return None


def stop_by_text(codec, ids):
    """The same from decoded texts: the first token in which a template ends that no letter or digit
    of the token follows."""
    def decode(ids):
        return codec.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    for i in range(1, len(ids) + 1):
        before, text = decode(ids[:i - 1]), decode(ids[:i])
        place = text.rfind(TEMPLATE)
        end = place + len(TEMPLATE)
        if place >= 0 and end > len(before) and not any(c.isalnum() for c in text[end:]):
            first = next(j for j in range(i) if len(decode(ids[:j + 1])) > place)
            return i, i - first
    return None


# ---- plain prompts

@pytest.fixture(scope="module")
def toy():
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    return Codec(tokenizer, [tokenizer.eos_token_id])


def test_plain_prompt_and_answer(toy):
    decode = toy.tokenizer.decode
    example = toy.example("here", Row("How many cookies are left?", "18"))
    assert decode(example.x) == "Question: How many cookies are left?\nAnswer:"
    assert decode(example.answer) == " 18.<eos>"
    assert example.answer[-1] == toy.turn_end == toy.eos[0]
    assert example.question == "How many cookies are left?"
    assert (example.gold, example.z) == ("18", [])
    example = toy.example("here", Row("How many?", "3", "Monday 1 + 2 = 3."))
    assert decode(example.z) == " Monday 1 + 2 = 3."


def test_templates_are_those_that_models_write(toy):
    """Released-code defect 9: " The answer is" and "The answer is" tokenise differently."""
    decode = toy.tokenizer.decode
    assert decode(toy.template_after_z) == decode(toy.template_at_start) == " The answer is"
    ids = toy.tokenizer(" Monday 1 + 2 = 3. The answer is 3.")["input_ids"]
    end, tokens = first_stop(toy, ids)
    assert decode(ids[:end]) == " Monday 1 + 2 = 3. The answer is"
    assert ids[end - tokens:end] == toy.template_after_z


def test_answer_ends_with_one_period():
    """No second period is added to an answer that is a sentence."""
    codec = Codec(tokenizer_of_bytes(), [2])
    example = codec.example("here", Row("How many?", "They run away."))
    assert codec.tokenizer.decode(example.answer[:-1]) == " They run away."


def test_plain_prompt_has_one_bos():
    tokenizer = tokenizer_of_bytes()
    example = Codec(tokenizer, [2]).example("here", Row("How many?", "18"))
    assert tokenizer.decode(example.x) == "<s>Question: How many?\nAnswer:"
    assert tokenizer.decode(example.answer) == " 18.</s>"


SHOTS = Row("One?", "1", "It is 1."), Row("Two?", "2.", "1 + 1 = 2.")


def test_prompt_with_examples_without_a_chat_template():
    codec = Codec(tokenizer_of_bytes(), [2], prompt="Q: {question} {x}", system="Be brief.",
                  shots=SHOTS)
    example = codec.example("here", Row("How many?", "18", "9 + 9 = 18."))
    assert codec.tokenizer.decode(example.x) == (
        "<s>Be brief.\n\nQuestion: Q: One? {x}\nAnswer: It is 1. The answer is 1.\n\n"
        "Question: Q: Two? {x}\nAnswer: 1 + 1 = 2. The answer is 2.\n\n"
        "Question: Q: How many? {x}\nAnswer:")
    assert codec.tokenizer.decode(example.z) == " 9 + 9 = 18." and example.question == "How many?"


def test_prompt_with_examples_in_a_chat_template():
    """As turns of their own; ids are those of the template's own rendering."""
    codec = Codec(tokenizer_of_bytes(CHAT), [2], prompt="Q: {question}", system="Be brief.",
                  shots=SHOTS)
    example = codec.example("here", Row("How many?", "18", "9 + 9 = 18."))
    turns = [("system", "Be brief."), ("user", "Q: One?"),
             ("assistant", "It is 1. The answer is 1."), ("user", "Q: Two?"),
             ("assistant", "1 + 1 = 2. The answer is 2."), ("user", "Q: How many?")]
    turns = [dict(role=role, content=text) for role, text in turns]
    given = codec.tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert example.x == given
    turns.append(dict(role="assistant", content="9 + 9 = 18. The answer is 18."))
    whole = codec.tokenizer.apply_chat_template(turns)["input_ids"]
    reply = example.x + example.z + codec.template_after_z + example.answer
    assert reply == whole[:len(reply)] and codec.turn_end == example.answer[-1] == 3


def test_a_template_that_leaves_the_system_turn_out():
    silent = CHAT.replace("{% for m in messages %}",
                          "{% for m in messages if m['role'] != 'system' %}")
    with pytest.raises(errors.UserError, match="leaves --system out; put it into --prompt"):
        Codec(tokenizer_of_bytes(silent), [2], system="Be brief.")
    refuses = ("{% if messages[0]['role'] == 'system' %}"
               "{{ raise_exception('no system') }}{% endif %}")
    with pytest.raises(errors.UserError, match="no system.*leave out --system"):
        Codec(tokenizer_of_bytes(refuses + CHAT), [2], system="Be brief.")


@pytest.mark.parametrize("chat_template", [None, CHAT], ids=["plain", "chat"])
def test_a_prompt_never_ends_with_eos(chat_template):
    """Some tokenizers add EOS to every text (add_eos_token)."""
    tokenizer = tokenizer_of_bytes(chat_template, end="$A </s>")
    assert tokenizer("a")["input_ids"][-1] == 2
    codec = Codec(tokenizer, [2])
    example = codec.example("here", Row("How many?", "18"))
    assert 2 not in example.x and example.x[0] == 1
    assert example.answer.count(2) == (chat_template is None)


def test_tokenizer_that_merges_words_is_refused():
    """Without splitting at words, BPE learns tokens that belong to both z and y."""
    with pytest.raises(errors.UserError, match="tokenizer"):
        Codec(tokenizer_of_bytes(regex=False), [2])


# ---- chat templates

def test_chat_prompt_comes_straight_from_the_template():
    """Released-code defect 9: it tokenises the rendered template, which adds a second BOS."""
    tokenizer = tokenizer_of_bytes(CHAT)
    codec = Codec(tokenizer, [2, 3])
    example = codec.example("here", Row("How many?", "18", "5 + 1 = 6."))
    asked = [dict(role="user", content="How many?")]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    assert example.x == prompt
    assert prompt[0] == tokenizer.bos_token_id and prompt.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(prompt) == "<s><|user|>\nHow many?<|end|>\n<|assistant|>\n"
    assert tokenizer.decode(example.answer) == " 18.<|end|>"  # not </s>: the template's turn end
    assert tokenizer.decode(example.z) == "5 + 1 = 6."
    assert_as_rendered(codec, example)


def assert_as_rendered(codec, example):
    """Prompt, gold z, template and answer are what the chat template writes, but for what it puts
    after the end of the turn."""
    reply = codec.text(example.z + codec.template_after_z + example.answer)
    assert " ".join(reply.split()) == "5 + 1 = 6. The answer is 18."
    turns = [dict(role="user", content=example.question), dict(role="assistant", content=reply)]
    whole = codec.tokenizer.apply_chat_template(turns)["input_ids"]
    ours = example.x + example.z + codec.template_after_z + example.answer
    assert ours == whole[:len(ours)] and len(whole) - len(ours) <= 3


@pytest.mark.parametrize("template, eos, turn_end", [
    (CHAT, [2], 3),  # the template's own token, though nothing calls it EOS
    (CHAT, [2, 3], 3),
    (CHAT.replace("<|end|>\n", "<|end|>\n{{ eos_token }}"), [2], 3),  # the first one counts
    (CHAT.replace("<|end|>\n", "{{ eos_token }}\n"), [2], 2),
    (CHAT.replace("<|end|>", "\n\n"), [2], 2),  # the template closes no turn
    ("{{ messages[0]['content'] }}", [2], 2)])  # and this one shows no reply
def test_the_template_says_what_closes_a_turn(template, eos, turn_end):
    """As for Qwen2.5's base model: its EOS is <|endoftext|>, its template ends with <|im_end|>."""
    codec = Codec(tokenizer_of_bytes(template), eos)
    assert codec.turn_end == turn_end and set(codec.eos) == {*eos, turn_end}
    assert codec.example("here", Row("How many?", "18")).answer[-1] == turn_end


def test_every_eos_of_the_model_counts(tmp_path):
    """Released-code defect 13: it looks up end tokens by hub name. Here they come from the model's
    own files: two from the generation config, another from the tokenizer."""
    tokenizer = tokenizer_of_bytes(CHAT)
    tokenizer.save_pretrained(tmp_path)
    LlamaConfig(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    GenerationConfig(eos_token_id=[5, 3]).save_pretrained(tmp_path)
    lines = [json.dumps(dict(question=f"How many? {i}", answer="18")) + "\n" for i in range(3)]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    args = latro.parse(["--model", str(tmp_path), "--task", "qa", "--data", str(tmp_path)])
    codec, _, _ = data.load_datasets(args)
    assert set(codec.eos) == {2, 3, 5} and codec.turn_end == 3


@pytest.mark.parametrize("clock", [
    "{{ strftime_now('%d %B %Y') }}",
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %B %Y') %}"
    "{% endif %}{{ date_string }}"])
def test_the_date_in_a_template_is_the_runs(clock):
    """Llama 3.2's template prints today's date: prompts would change overnight."""
    def prompt(day):
        codec = Codec(tokenizer_of_bytes(clock + CHAT), [2], today=day)
        return codec.tokenizer.decode(codec.example("here", Row("How many?", "18")).x)
    assert prompt("2026-07-26").startswith("26 July 2026")
    assert prompt(None).startswith(date.today().strftime("%d %B %Y"))


# ---- answers that could never be right

@pytest.mark.parametrize("gold", ["18\n19", "a The answer is b", "."])
def test_an_answer_that_no_reply_can_give_is_refused(gold):
    codec = Codec(tokenizer_of_bytes(), [2])
    with pytest.raises(errors.UserError, match="^here: the answer .* could never be graded"):
        codec.example("here", Row("How many?", gold))


def test_an_answer_that_the_tokenizer_changes():
    """A change that grading does not see is fine; one that it sees would make every reply wrong."""
    codec = Codec(tokenizer_of_bytes(normalizer=normalizers.NFC()), [2])
    assert codec.example("here", Row("Where?", "Cafe\u0301")).gold == "Cafe\u0301"
    codec = Codec(tokenizer_of_bytes(normalizer=normalizers.Replace("m", "n")), [2])
    with pytest.raises(errors.UserError, match="here: the answer 'magnet' .* reads .*nagnet"):
        codec.example("here", Row("What?", "magnet"))


# ---- where a template stops z

def test_stop_table_by_hand():
    """Template "AbC". Tokens: whole, cut, glued to what precedes or follows, and a false start."""
    texts = ["AbC", "A", "b", "C", "xA", "bC", "C.", "Cx", "C A", "Ab", "", " AbC: "]
    table = stop_table(texts, "AbC").tolist()
    fresh = [-3, -1, 0, 0, -1, 0, 0, 0, -1, -2, 0, -3]
    assert table[0] == table[3] == fresh
    assert table[1] == [-3, -1, 2, 0, -1, 3, 0, 0, -1, -2, 1, -3]
    assert table[2] == [-3, -1, 0, 3, -1, 0, 3, 0, -1, -2, 2, -3]


def test_a_period_and_a_newline_in_one_token():
    """Tokenizers with Llama 3's or Qwen's pattern have a token ".\\n". A template after it has no
    leading space."""
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
    codec = Codec(tokenizer, [0])
    for before in ("3.\n", "3. ", "3\n", "3\n\n", "", '"', "(", ".", "\t"):
        ids = tokenizer(f"{before}The answer is 4")["input_ids"]
        end, _ = first_stop(codec, ids)
        assert tokenizer.decode(ids[:end]) == f"{before}The answer is", before
    assert tokenizer.decode(tokenizer("It is 3.\n")["input_ids"][-1:]) == ".\n"
    assert tokenizer.decode(codec.template_after_z) == " The answer is"


PIECES = ["The answer is", " The answer is", "\nThe answer is", '"The answer is', "(The answer is",
          ".The answer is", "\tThe answer is", "**The answer is**", "the answer is", "The answer",
          "The answer isn't", "The answer island", "TheThe answer is", " is", " 18.", "18", ": ",
          "5 + 1 = 6", ".", "\n\n", " ", '"', "caf\u00e9 ", "\u4e2d", "The  answer is", "answer is"]


@pytest.mark.slow
@pytest.mark.parametrize("name", real_tokenizers.FILES)
def test_real_vocabularies(name, tmp_path):
    """In any text that contains the template z stops right there; so it does if the tokens are not
    those that the tokenizer would take. What is planted stops it, too."""
    if missing := real_tokenizers.missing():
        pytest.skip(f"not installed: {', '.join(missing)}")
    tokenizer, rng = real_tokenizers.load(name, tmp_path), random.Random(0)
    codec = Codec(tokenizer, [tokenizer.eos_token_id])
    texts = codec.token_texts(len(tokenizer))
    found = 0
    for _ in range(1500):
        ids = codec.ids("".join(rng.choices(PIECES, k=rng.randint(1, 5))))
        wanted = stop_by_text(codec, ids)
        assert first_stop(codec, ids) == wanted, tokenizer.decode(ids)
        found += wanted is not None
    assert 500 < found < 1450
    parts = {t: text for t, text in enumerate(texts) if text and text in TEMPLATE}
    for _ in range(300):  # the template in random cuts, some of them broken off
        ids, rest = codec.ids("."), TEMPLATE
        while rest and rng.random() < 0.95:
            ids.append(rng.choice([t for t, text in parts.items() if rest.startswith(text)]))
            rest = rest[len(texts[ids[-1]]):]
        assert first_stop(codec, ids) == stop_by_text(codec, ids), tokenizer.decode(ids)
        assert (first_stop(codec, ids) is None) == bool(rest)
    for planted in (codec.template_at_start, codec.template_after_z):
        assert first_stop(codec, planted) == (len(planted), len(planted))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral", "mistral_v1", "llama3"])
def test_a_template_that_ends_in_a_newline(name, tmp_path):
    """Zephyr's and TinyLlama's templates do. SentencePiece has other tokens for the first word
    there than for a word after nothing."""
    if missing := real_tokenizers.missing():
        pytest.skip(f"not installed: {', '.join(missing)}")
    tokenizer = real_tokenizers.load(name, tmp_path)
    tokenizer.chat_template = CHAT.replace("<|end|>", "{{ eos_token }}").replace(
        "{{ bos_token }}", "")
    codec = Codec(tokenizer, [tokenizer.eos_token_id])
    example = codec.example("here", Row("How many?", "18", "5 + 1 = 6."))
    assert_as_rendered(codec, example)
    turns = [dict(role="user", content="a"), dict(role="assistant", content="The answer is")]
    whole = tokenizer.apply_chat_template(turns)["input_ids"]
    prompt = codec.ids(codec.prompt("a"))
    assert whole[len(prompt):][:len(codec.template_at_start)] == codec.template_at_start


# ---- long prompts

def test_longrope_says_why_a_prompt_is_too_long():
    config = SimpleNamespace(max_position_embeddings=131072, rope_parameters=dict(
        rope_type="longrope", original_max_position_embeddings=4096))
    context, reason = context_of(config)
    assert context == 4096 and "4096 (of its 131072 positions; longrope" in reason
    config = SimpleNamespace(max_position_embeddings=2048, rope_parameters=None)
    assert context_of(config) == (2048, "the model's context of 2048")
