"""Proves that bad input ends a run before it begins, with one line that names the value and the way
out, without a traceback and without touching a file. A run that diverges ends in the same way."""

import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM, AutoTokenizer, CLIPConfig, Gemma2Config, GPT2Config, MambaConfig,
    T5Config)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this file is also a script
from conftest import ROOT, TINY, TOY, contents, launch, rows, start, write_rows

import latro  # after conftest, which puts the repository on the path

BAR = re.compile(r"\d+%\||it/s\]|^\x1b\[A$")  # a progress bar
FLAGS = f"--model {TOY} --task qa --data data --steps 1 --questions 2 --K 2 --L 8".split()


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    """Makes a new directory the current one, with good data in data/."""
    monkeypatch.chdir(tmp_path)
    write_rows("data")


@pytest.fixture
def refusal(capsys):
    """A function that runs latro.py with flags that must fail, and returns its line on stderr."""
    def refusal(*flags):
        with pytest.raises(SystemExit) as stop:
            sys.exit(latro.main([*map(str, flags)]))
        code, errors = stop.value.code, capsys.readouterr().err
        if isinstance(code, str):  # sys.exit prints it, and exits with 1
            code, errors = 1, f"{errors}{code}\n"
        assert code and code == int(code)
        return only_line(errors)
    return refusal


def only_line(errors):
    """The one line on stderr, without progress bars."""
    lines = [s for s in re.split(r"[\r\n]+", errors) if s.strip() and not BAR.search(s)]
    assert len(lines) == 1 and lines[0].startswith("latro.py: "), errors
    assert "Traceback" not in errors
    return lines[0]


def assert_has(line, *words):
    assert all(word in line for word in words), (line, words)


# ---- flags

@pytest.mark.parametrize("flags, words", [
    ("--K 1", ["--K 1", "at least 2"]), ("--K 0", ["--K 0", "at least"]),
    ("--K many", ["--K", "many"]), ("--beta -1", ["--beta -1", "at least 0"]),
    ("--lr nan", ["--lr nan"]), ("--lr -1", ["--lr -1"]),
    ("--steps 0", ["--steps 0", "at least 1"]), ("--temperature 0", ["--temperature 0"]),
    ("--micro 0", ["--micro 0"]), ("--L 0", ["--L 0"]), ("--questions 0", ["--questions 0"]),
    ("--eval-questions 0", ["--eval-questions 0"]),
    ("--answer-weight nan", ["--answer-weight nan"]),
    ("--bound tight", ["--bound", "tight", "elbo", "iwae"]),
    ("--task math", ["--task", "math", "gsm8k"]),
    ("--reward 1", ["--reward", "logp", "prob"]), ("--learning-rate 1", ["--learning-rate"]),
    ("--kernels cuda", ["--kernels", "cuda", "auto"]), ("--epochs 2", ["--steps", "--epochs"]),
    ("--bound iwae --reward prob", ["iwae", "prob"]), ("--seed -1", ["--seed -1"]),
    ("--bound iwae --reward mean-prob", ["iwae", "mean-prob"]),
    ("--reward correct --credit full", ["--reward correct", "--credit"]),
    ("--reward correct --answer-weight 0.1", ["--reward correct", "--answer-weight"]),
    ("--reward correct --objective sft", ["--objective sft", "--reward"]),
    ("--L 1.5", ["--L", "1.5"]), ("--plan -1", ["--plan -1"]), ("--shard 2", ["--shard 2"]),
    ("--timeout 1e30", ["too large"]),
    ("--beta inf", ["--beta inf"]), ("--resume=yes", ["--resume"]), ("--plan", ["--plan"]),
    ("--no-K", ["--no-K"]), ("stray", ["stray"]), ("--model=", ["--model", "empty"]),
    ("--data=", ["--data", "empty"]), ("--out=", ["--out", "empty"]),
    ("--date yesterday", ["--date yesterday", "2026-11-26"]),
])  # fmt: skip
def test_bad_flag(flags, words, refusal):
    assert_has(refusal(*FLAGS, *flags.split()), *words)
    assert not Path("out").exists()


def test_more_rationales_than_memory(refusal):
    """The only bad flag that is found during a run."""
    assert_has(refusal(*FLAGS, "--K", 10**9), "out of memory", "--K", "lower")
    assert not Path("out", "model.safetensors").exists()


@pytest.mark.parametrize("flags, words", [
    ("--epochs 0", ["--epochs 0"]), ("--epochs inf", ["--epochs inf"]),
    ("--task qa", ["--model", "--data"]),
    ("--task qa --data data", ["--model"]), (f"--task qa --model {TOY}", ["--data"]),
])  # fmt: skip
def test_bad_flag_with_default_settings(flags, words, refusal):
    assert_has(refusal(*f"--eval-questions 1 {flags}".split()), *words)
    assert not Path("out").exists()


def test_prompt_without_a_question(refusal):
    assert_has(refusal(*FLAGS, "--prompt", "Think!"), "--prompt Think!", "{question}")


@pytest.mark.parametrize("flags, words", [
    ("--questions 3", ["--questions 3", "2 processes"]), ("--questions 4 --shard 3", ["--shard 3"]),
])  # fmt: skip
def test_number_of_processes(flags, words, refusal, monkeypatch):
    for name, value in dict(RANK=0, WORLD_SIZE=2, MASTER_ADDR="localhost", MASTER_PORT=0).items():
        monkeypatch.setenv(name, str(value))
    assert_has(refusal(*FLAGS, *flags.split()), *words)


@pytest.mark.parametrize("names, missing", [
    (["RANK"], "WORLD_SIZE and MASTER_ADDR and MASTER_PORT"), (["WORLD_SIZE"], "RANK"),
    (["RANK", "WORLD_SIZE", "MASTER_ADDR"], "MASTER_PORT")])
def test_half_an_environment_of_torchrun(names, missing, refusal, monkeypatch):
    """A lone RANK=3 would be a run that never prints or writes."""
    for name in names:
        monkeypatch.setenv(name, "0")
    assert_has(refusal(*FLAGS), f"but not {missing}", "torchrun", "unset")
    assert not Path("out").exists()


def test_an_address_alone_is_not_torchruns(monkeypatch):
    """Some clusters set it everywhere."""
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    start(*FLAGS, out="out")


def test_one_line_from_the_shell():
    """Unlike the cases above, this includes what Python and the libraries print."""
    code, printed, errors = launch(*FLAGS, "--model", "nobody/nothing")
    assert code == 1 and printed == ""
    assert_has(only_line(errors), "--model nobody/nothing", "directory")


@pytest.mark.slow
@pytest.mark.parametrize("script", [ROOT / "latro.py", __file__], ids=["", "the first is slow"])
def test_one_line_from_two_processes(script):
    """torchrun ends all processes as soon as one has ended."""
    code, _, errors = launch(*FLAGS, "--questions", 3, processes=2, script=script)
    lines = [s for s in errors.splitlines() if "latro.py: " in s]
    assert code != 0
    assert len(lines) == 1 and "--questions 3" in lines[0]  # the main process reports for all


# ---- data

ROW = '{"question": "a", "answer": "1"}\n'


@pytest.mark.parametrize("text, words", [
    (None, ["--data data", "train"]), ("", ["--data data", "train"]),
    (ROW, ["--data data", "2 rows"]),
    (ROW + '{"question": "a"\n', ["train.jsonl:2", "JSON"]),
    (ROW + '["a", "1"]\n', ["train.jsonl:2", "row"]),
    (ROW + '{"question": "a"}\n', ["train.jsonl:2", "answer"]),
    (ROW + '{"answer": "a"}\n', ["train.jsonl:2", "question"]),
    (ROW + '{"question": "a", "answer": 1}\n', ["train.jsonl:2"]),
    (ROW + '{"question": "a", "answer": ""}\n', ["train.jsonl:2", "answer"]),
    ('{"question": "a", "answer": "  "}\n' + ROW, ["train.jsonl:1", "answer"]),
    (b'{"question": "caf\xe9", "answer": "1"}\n' * 2, ["train.jsonl", "UTF-8"]),
    (ROW + "[" * 100_000 + "\n", ["train.jsonl:2", "JSON"]),
    (ROW.replace("{", '{"id": 7, ') * 2, ["train.jsonl:2", "id 7", "train.jsonl:1"]),
    (ROW + ROW.replace('"a"', '"\\ud800"'), ["train.jsonl:2", "row"]),
    (ROW + ROW.replace("1", "\\ud800"), ["train.jsonl:2"]),
    (ROW + '{"question": "a", "answer": "1", "rationale": 5}\n', ["train.jsonl:2"]),
    (ROW + "null\n", ["train.jsonl:2", "row"]), (ROW + "\n" + ROW, ["train.jsonl:2", "JSON"]),
])  # fmt: skip
def test_train_jsonl(text, words, refusal):
    path = Path("data", "train.jsonl")
    path.unlink()
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert_has(refusal(*FLAGS), *words)
    assert not Path("out").exists()


def test_held_out_rows_are_checked_too(refusal):
    Path("data", "validation.jsonl").write_text(ROW + '{"question": "a"}\n')
    assert_has(refusal(*FLAGS), "validation.jsonl:2", "answer")


def test_missing_data(refusal):
    flags = [*FLAGS, "--task", "gsm8k"]
    assert_has(refusal(*flags, "--data", "nobody/nothing"), "--data nobody/nothing", "train.jsonl")
    assert_has(refusal(*flags, "--data", "./nowhere"), "--data ./nowhere", "train.jsonl")


def test_rows_of_another_task(refusal):
    line = refusal(*FLAGS, "--task", "arc_challenge")
    assert_has(line, "train.jsonl:1", "arc_challenge", "choices")


def test_question_longer_than_the_context(refusal):
    assert_has(refusal(*FLAGS, "--L", 300), "train.jsonl:1", "--L 300", "256")
    write_rows("data", n=3, question="On Monday? " * 150)
    assert_has(refusal(*FLAGS), "train.jsonl:1", "256", "--L 8")


# ---- models

@pytest.mark.parametrize("model", ["nobody/nothing", "./nowhere"])
def test_missing_model(model, refusal):
    for flags in ([], ["--plan", 1]):
        assert_has(refusal(*FLAGS, "--model", model, *flags), f"--model {model}", "directory")
        assert not Path("out").exists()


@pytest.mark.parametrize("config, word", [
    (Gemma2Config(), "gemma2"), (T5Config(), "t5"), (GPT2Config(), "gpt2"),
    (MambaConfig(), "mamba"), (CLIPConfig(), "clip"),
], ids=lambda v: getattr(v, "model_type", None))  # fmt: skip
def test_unsupported_architecture(config, word, refusal):
    """The configuration alone decides: there are no weights here."""
    AutoTokenizer.from_pretrained(TOY).save_pretrained("model")
    config.save_pretrained("model")
    for flags in ([], ["--plan", 1]):
        assert_has(refusal(*FLAGS, "--model", "model", *flags), "--model model", word, "Llama")
        assert not Path("out").exists()


def copy_of_toy(**settings):
    """Copies the toy to ./model, and changes values in all of its JSON settings."""
    shutil.copytree(TOY, "model")
    for name in ("config", "generation_config", "tokenizer_config"):
        path = Path("model", f"{name}.json")
        before = json.loads(path.read_text())
        path.write_text(json.dumps({k: settings.get(k, v) for k, v in before.items()}))


TOY_CONFIG = json.loads((TOY / "config.json").read_text())


@pytest.mark.parametrize("name, text, words", [
    ("config.json", None, ["model_type"]), ("config.json", "{nope", ["JSON"]),
    ("config.json", "[]", ["no whole model"]),
    ("config.json", json.dumps(TOY_CONFIG | dict(hidden_size="wide")), ["hidden_size"]),
    ("config.json", json.dumps(TOY_CONFIG | dict(num_attention_heads=0)), ["Zero"]),
    ("config.json", json.dumps(TOY_CONFIG | dict(hidden_size=64)), ["weights"]),
    ("tokenizer.json", None, ["tokenizer"]), ("tokenizer.json", "{nope", ["JSON"]),
    ("tokenizer.json", "\udcff", ["utf-8"]), ("tokenizer_config.json", "[1", ["JSON"]),
    ("chat_template.jinja", "{% if", ["chat template"]),
    ("chat_template.jinja", "{{ raise_exception('system first') }}", ["system first"]),
    ("model.safetensors.index.json", "{nope", []),
])  # fmt: skip
def test_damaged_model_directory(name, text, words, refusal):
    copy_of_toy()
    path = Path("model", name)
    path.unlink(missing_ok=True)
    if name.endswith("index.json"):
        Path("model/model.safetensors").unlink()
    if text is not None:
        path.write_bytes(text.encode(errors="surrogateescape"))
    line = refusal(*FLAGS, "--model", "model")
    assert_has(line, *words)
    assert "model" in line and not Path("out").exists()


def test_tokenizer_without_eos(refusal):
    copy_of_toy(eos_token=None, eos_token_id=None)
    assert_has(refusal(*FLAGS, "--model", "model"), "--model model", "EOS")


def test_model_without_weights(refusal):
    """It must not leave a partial run in --out that would block the next try."""
    copy_of_toy()
    Path("model", "model.safetensors").unlink()
    assert_has(refusal(*FLAGS, "--model", "model"), "model.safetensors")
    shutil.copy(TOY / "model.safetensors", "model")
    assert not latro.main([*FLAGS, "--model", "model"])


# ---- --out and --resume

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return start(*TINY, "--steps", 1, out=tmp_path_factory.mktemp("finished") / "out")


def test_out_holds_another_run(finished, refusal):
    before = contents(finished)
    line = refusal(*TINY, "--steps", 1, "--out", finished)
    assert_has(line, f"--out {finished}", "--resume", "another")
    assert contents(finished) == before


def test_out_holds_a_model(refusal):
    shutil.copytree(TOY, "out")
    before = contents("out")
    assert_has(refusal(*FLAGS), "--out out", "model", "another")
    assert contents("out") == before


def test_resume_of_a_model(refusal):
    """A model without latro.json is not a run: resuming would overwrite it."""
    shutil.copytree(TOY, "out")
    before = contents("out")
    assert_has(refusal(*FLAGS, "--resume"), "out")
    assert contents("out") == before


def test_out_is_a_file(refusal):
    Path("out").write_text("precious")
    assert_has(refusal(*FLAGS), "out")
    assert Path("out").read_text() == "precious"


def test_resume_with_changed_flags(finished, refusal):
    before = contents(finished)
    line = refusal("--resume", "--K", 4, "--lr", 0.1, "--questions", 2, "--out", finished)
    assert_has(line, "--K 3 -> 4", "--lr 0.0003 -> 0.1", "another --out")
    assert "--questions" not in line  # given, but the same
    assert contents(finished) == before


@pytest.mark.parametrize("name, text, words", [
    ("latro.json", "{", ["latro.json", "version"]), ("latro.json", "[]", ["latro.json"]),
    ("latro.json", "{}", ["latro.json", "args"]),
    ("latro.json", '{"args": {"banana": 1}, "base": "m"}', ["latro.json", "banana"]),
    ("metrics.jsonl", "{\n{}\n", ["metrics.jsonl:1", "line"]),
    ("metrics.jsonl", "5\n", ["metrics.jsonl:1"]), ("evals.jsonl", "\udcff\n", ["evals.jsonl:1"]),
    ("samples.jsonl", None, ["samples.jsonl"]), ("metrics.jsonl", None, ["metrics.jsonl"]),
])  # fmt: skip
def test_damaged_run(name, text, words, finished, refusal):
    """Files that are not damaged stay as they were."""
    shutil.copytree(finished, "out")
    path = Path("out", name)
    path.unlink()
    if text is not None:
        path.write_bytes(text.encode(errors="surrogateescape"))
    before = contents("out")
    assert_has(refusal("--resume", "--out", "out"), *words)
    after = contents("out")
    assert {k: v for k, v in after.items() if k in before} == before


# ---- a run that diverges

def test_gradient_that_is_not_finite(refusal):
    """An enormous learning rate ruins the weights in the first update, so the second one fails. The
    checkpoint of the first stays."""
    flags = [*TINY, "--steps", 3, "--lr", 1e30, "--save-every", 1, "--out", "out"]
    assert_has(refusal(*flags), "update 2", "--lr", "out")
    assert [p.name for p in Path("out", "state").glob("step-*")] == ["step-000001"]
    assert [row["step"] for row in rows("out")] == [1]
    AutoModelForCausalLM.from_pretrained("out")


def test_weights_that_are_not_finite(refusal):
    copy_of_toy()
    weights = load_file("model/model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, "model/model.safetensors", {"format": "pt"})
    line = refusal(*TINY, "--model", "model", "--task", "toy", "--steps", 1)
    assert_has(line, "update 1", "not finite", "train.jsonl:")
    assert not Path("out", "model.safetensors").exists()


def test_gradient_that_is_not_finite_after_resuming(refusal):
    """The same in a resumed run: its checkpoint and logs stay as they were."""
    out = start(*TINY, "--steps", 3, "--save-every", 1, "--lr", 1e30, out="out", stop=1)
    kinds = (".safetensors", ".distcp", ".jsonl")
    before = {k: v for k, v in contents(out).items() if k.suffix in kinds}
    assert_has(refusal("--resume", "--out", "out"), "update 2")
    after = contents(out)
    assert before and all(after[k] == v for k, v in before.items())


if __name__ == "__main__":
    time.sleep(3 * (os.environ["RANK"] == "0"))
    latro.exit_process(latro.main())
