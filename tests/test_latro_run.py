"""Proves what out/ holds, what every flag does, and that a run stops and resumes bit-equal.

The real script, end to end on the shipped toy. One thread on a CPU repeats itself exactly."""

import dataclasses
import json
import math
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import import_utils

import latro
from conftest import (
    HELD, ROOT, TINY, TOY, contents, launch, rows, start, under_way, untimed, write_rows)

CONTRACT = set("""step epoch elbo logp_y kl reward reward_std z_len finished grad_norm lr seconds
                  tokens_per_s peak_mem_gb""".split())
LINES = len((ROOT / "toy" / "train.jsonl").read_text().splitlines())


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """Three updates of the toy as a user runs them: its out/ and what it printed."""
    out = tmp_path_factory.mktemp("shipped") / "out"
    flags = "--steps 3 --questions 4 --K 4 --eval-questions 8".split()
    code, printed, errors = launch(*flags, "--out", out)
    assert code == 0, errors
    return out, printed


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    """Two small updates with default flags, with which other flags are compared."""
    return start(*TINY, "--steps", 2, out=tmp_path_factory.mktemp("default") / "out")


def two(tmp_path, *flags):
    """The metrics of two small updates with other flags."""
    return rows(start(*TINY, "--steps", 2, *flags, out=tmp_path / "out"))


@pytest.mark.parametrize("installed, first", [
    (False, "from transformers import LlamaModel"), (False, ""), (True, "")])
@pytest.mark.slow
def test_imports_with_transformers(installed, first, tmp_path):
    """transformers looks for Hugging Face's package "kernels", and imports from it where its
    version fits: ours must not be taken for it, whether that one is installed or not."""
    version = import_utils.KERNELS_MIN_VERSION
    if installed:
        note = tmp_path / f"kernels-{version}.dist-info" / "METADATA"
        note.parent.mkdir()
        note.write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    (tmp_path / "script.py").write_text(f"""import sys; sys.path += {[str(ROOT), str(tmp_path)]}
{first}
import latro
from transformers import LlamaModel""")
    code, _, errors = launch(script=tmp_path / "script.py")
    assert code == 0, errors[-500:]


# ---- out/

def test_out_is_an_ordinary_model_that_learned(shipped):
    out, _ = shipped
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    base = AutoModelForCausalLM.from_pretrained(TOY)
    assert model.dtype == base.dtype
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    ours, theirs = model.state_dict(), base.state_dict()
    change = [(ours[k] - theirs[k]).abs().max() for k in theirs]
    assert all(0 < c < 3e-3 for c in change)  # every weight tensor moved, none of them far
    x = tokenizer("Question: Tom owns 3 cookies. On Monday he wins 2 more. How many cookies are "
                  "left?\nAnswer:", return_tensors="pt")
    assert "The answer is" in tokenizer.decode(model.generate(**x, max_new_tokens=48)[0])


def test_metrics_keep_the_contract(shipped):
    metrics = rows(shipped[0])
    assert [row["step"] for row in metrics] == [1, 2, 3]
    for row in metrics:
        assert CONTRACT <= set(row)
        assert set(row["seconds"]) == {"sample", "score", "backward", "step"}
        numbers = [v for k, v in row.items() if k != "seconds"] + [*row["seconds"].values()]
        assert all(math.isfinite(v) for v in numbers)
        assert row["elbo"] == pytest.approx(row["logp_y"] - row["kl"])
        assert row["reward"] == pytest.approx(row["logp_y"] - 0.05 * row["kl"])


def test_first_kl_is_zero(shipped):
    """Released-code defect 8: its reference runs in another dtype, so KL != 0 at the start."""
    metrics, evals = rows(shipped[0]), rows(shipped[0], "evals")
    assert metrics[0]["kl"] == 0.0 and evals[0]["kl"] == 0.0
    assert metrics[1]["kl"] != 0.0


def test_learning_rate_falls_linearly_to_zero(shipped, tmp_path):
    lr = [row["lr"] for row in rows(shipped[0])]
    assert lr == pytest.approx([3e-4, 2e-4, 1e-4])
    lr = [row["lr"] for row in two(tmp_path, "--steps", 5, "--warmup", 2, "--lr", 6e-4)]
    assert lr == pytest.approx([2e-4, 4e-4, 6e-4, 4e-4, 2e-4])


def test_evaluations_first_and_last(shipped):
    """Released-code defect 10: it never evaluates before training."""
    evals = rows(shipped[0], "evals")
    assert [row["step"] for row in evals] == [0, 3]
    assert all(row["n"] == 8 for row in evals)
    assert {"step", "split", "n", "greedy", "logp_y", "elbo", "z_len", "finished"} <= set(evals[0])
    texts = [r for r in rows(shipped[0], "samples") if r["split"] == "train"]
    assert [r["step"] for r in texts] == [1, 2, 3] and "Monday" in texts[0]["question"]


def test_state_and_notes(shipped):
    out, printed = shipped
    assert [p.name for p in (out / "state").glob("step-*")] == ["step-000003"]
    notes = json.loads((out / "latro.json").read_text())
    assert set(notes["args"]) == {f.name for f in dataclasses.fields(latro.Args)}
    assert notes["args"]["steps"] == 3 and notes["args"]["lr"] == 3e-4  # given, and of the preset
    assert notes["base"] == str(TOY) and notes["torch"] == torch.__version__
    assert {"transformers", "python", "commit", "gpu", "processes"} <= set(notes)
    assert "before" in printed and "after" in printed


def test_every_flag_is_recorded(tmp_path):
    flags = dict(model=str(TOY), task="qa", data=HELD.name, bound="iwae", credit="full", K=3, L=20,
                 beta=0.1, temperature=1.2, questions=3, micro=2, steps=1, lr=1e-4, warmup=1,
                 grad_clip=0.5, answer_weight=0.5, truncation_penalty=1.0, eval_every=1,
                 eval_questions=3, save_every=1, keep=1, timeout=9.0, seed=3, kernels="torch",
                 matmul_precision="high", date="2026-07-26", prompt="{question} Well",
                 system="Tom", shots=0)
    given = [f"--{k.replace('_', '-')}={v}" for k, v in flags.items()]
    out = start(*given, "--no-checkpointing", out=tmp_path / "out")
    noted = json.loads((out / "latro.json").read_text())["args"]
    rest = dict(out=str(out), objective="latro", reward="logp", epochs=None, shard=0,
                checkpointing=False, resume=False, plan=False, reference=None, lora_rank=0,
                lora_alpha=16.0, log_to=None)
    assert noted == flags | rest


def test_steps_and_epochs_print_each_other(shipped, data, tmp_path, capsys):
    """Released-code defect 4: its epochs count rollouts. Here an epoch is each question once."""
    assert f"3 updates of 4 questions = {12 / LINES:.3g} epochs" in shipped[1]
    assert rows(shipped[0])[-1]["epoch"] == pytest.approx(12 / LINES)
    write_rows(data, n=8)
    flags = [*TINY, "--model", TOY, "--task", "qa", "--data", data, "--questions", 1, "--epochs", 2]
    out = start(*flags, "--L", 2, "--no-checkpointing", out=tmp_path / "out")
    assert "14 updates of 1 questions = 2 epochs" in capsys.readouterr().out
    asked = [r["question"] for r in rows(out, "samples") if r["split"] == "train"]
    first, second = asked[:7], asked[7:]  # 8 rows, one of them held out
    assert set(first) == set(second) and len(set(first)) == 7 and first != second
    assert rows(out)[6]["epoch"] == pytest.approx(1.0)


# ---- data

def prepared(data, *flags):
    args = latro.parse([*f"--model {TOY} --task qa --data {data} --L 48".split(), *flags])
    _, training, held_out = latro.load_datasets(args)
    return [e.question for e in training], [e.question for e in held_out]


def test_held_out_is_the_end_of_train_and_never_test(data):
    """Released-code defect 10: it chooses its checkpoint on the test set."""
    (data / "test.jsonl").write_text("whoever reads this fails")
    made = [row["question"] for row in write_rows(data, n=40)]
    assert prepared(data) == (made[:38], made[38:])


def test_validation_split_is_held_out(data):
    (data / "test.jsonl").write_text("whoever reads this fails")
    held_out = [r["question"] for r in write_rows(data, "validation", n=5, question="On Monday?")]
    training, found = prepared(data, "--eval-questions", "3")
    assert len(training) == 20 and found == held_out[:3]


# ---- flags act

def test_sft_raises_the_answer(tmp_path):
    """log p(y|x) of the same eight questions, update after update."""
    write_rows(tmp_path / "data", n=9)
    flags = ["--model", TOY, "--task", "qa", "--data", tmp_path / "data", "--no-checkpointing"]
    metrics = two(tmp_path, *flags, *"--objective sft --steps 10 --questions 8 --lr 1e-3".split())
    assert metrics[-1]["logp_y"] > metrics[0]["logp_y"] + 1
    assert metrics[0]["z_len"] == 0 and metrics[0]["elbo"] is None


def test_sft_learns_the_given_rationale(tmp_path):
    """Released-code defect 12: SFT trains on one prompt and is evaluated on another. Here the reply
    that it learned comes back on held-out questions."""
    write_rows(tmp_path / "data", rationale="Monday 1 + 2 = 3.", answer="7")
    flags = ["--model", TOY, "--task", "qa", "--data", tmp_path / "data", "--no-checkpointing"]
    metrics = two(tmp_path, *flags, *"--objective sft --steps 12 --questions 8 --lr 1e-3".split())
    assert metrics[0]["z_len"] == 7  # Monday 1 + 2 = 3 .
    before, after = rows(tmp_path / "out", "evals")
    assert before["greedy"] == 0.0 and after["greedy"] == 1.0
    reply = rows(tmp_path / "out", "samples")[-1]["questions"][0]
    assert reply["text"] == "Monday 1 + 2 = 3. The answer is 7."


def test_iwae_weighs_rationales_otherwise(tmp_path, default):
    ours, theirs = two(tmp_path, "--bound", "iwae"), rows(default)
    assert ours[0]["logp_y"] == theirs[0]["logp_y"]  # the same rationales
    assert ours[0]["grad_norm"] != theirs[0]["grad_norm"]
    assert ours[1]["logp_y"] != theirs[1]["logp_y"]


def test_prob_rewards_a_probability(tmp_path, default):
    ours, theirs = two(tmp_path, "--reward", "prob", "--beta", 0), rows(default)
    assert all(0 <= row["reward"] <= 1 for row in ours)
    assert ours[0]["logp_y"] == theirs[0]["logp_y"]  # the same rationales
    assert ours[0]["grad_norm"] != theirs[0]["grad_norm"]


def test_mean_prob_rewards_the_mean_probability_of_a_token(tmp_path, default):
    """It is at least the probability of all of y."""
    ours, theirs = two(tmp_path, "--reward", "mean-prob", "--beta", 0), rows(default)
    rationales = [s for row in rows(tmp_path / "out", "samples")[1:3] for s in row["samples"]]
    assert all(math.exp(s["logp_y"]) <= s["reward"] <= 1 for s in rationales)
    assert ours[0]["logp_y"] == theirs[0]["logp_y"]  # the same rationales
    assert ours[0]["grad_norm"] != theirs[0]["grad_norm"]


def test_correct_rewards_the_policys_own_answer(tmp_path, default):
    """The same z as ever, each with an answer of the policy's own, which is all that counts: no y
    is scored. An evaluation scores it as ever."""
    ours, theirs = two(tmp_path, "--reward", "correct", "--beta", 0), rows(default)
    assert ours[0]["z_len"] == theirs[0]["z_len"]
    assert all(row["logp_y"] is row["elbo"] is row["answer"] is None for row in ours)
    rationales = [s for row in rows(tmp_path / "out", "samples")[1:3] for s in row["samples"]]
    assert all(s["reward"] == s["right"] and s["answers"] == 0 for s in rationales)
    assert all(s["actions"] > s["z_len"] + 3 for s in rationales if s["right"])  # "The answer is"
    assert {s["right"] for s in rationales} == {True, False}
    evals, others = rows(tmp_path / "out", "evals"), rows(default, "evals")
    assert evals[0]["logp_y"] == others[0]["logp_y"] and evals[0]["reward"] == evals[0]["sampled"]


def test_full_credit_puts_the_template_into_y(tmp_path, default):
    ours, theirs = two(tmp_path, "--credit", "full")[0], rows(default)[0]
    assert ours["z_len"] == theirs["z_len"]  # the same rationales
    assert ours["logp_y"] < theirs["logp_y"]  # and more to answer after them


def test_answer_weight_is_on_unless_taken_away(tmp_path, default):
    """Released-code defect 2: its second gradient term is off by default."""
    ours, theirs = two(tmp_path, "--answer-weight", 0), rows(default)
    assert ours[0]["logp_y"] == theirs[0]["logp_y"]  # the same rationales
    assert ours[0]["grad_norm"] != theirs[0]["grad_norm"]


def test_beta_zero_loads_no_reference(tmp_path, monkeypatch):
    loads = []
    load_model = latro.load_model

    def spy(*args):
        loads.append(args)
        return load_model(*args)
    monkeypatch.setattr(latro, "load_model", spy)
    metrics = two(tmp_path, "--beta", 0)
    assert len(loads) == 1
    assert all(row["elbo"] is None and row["kl"] is None for row in metrics)
    assert all(row["reward"] == pytest.approx(row["logp_y"]) for row in metrics)


def test_pi_0_may_be_another_model(shipped, tmp_path):
    """The KL is to --reference, from the first update on, and the same as from a trained policy to
    its base. latro.json records both."""
    flags = "--model", shipped[0], "--reference", TOY, "--task", "toy"
    ours, theirs = two(tmp_path, *flags)[0], rows(start(
        *TINY, "--model", shipped[0], "--task", "toy", "--steps", 1, out=tmp_path / "alone"))[0]
    assert ours["kl"] != 0 == theirs["kl"] and ours["logp_y"] == theirs["logp_y"]
    first = rows(tmp_path / "out", "samples")[1]["samples"]
    assert all(s["logp_z"] != s["logp0_z"] for s in first)
    note = json.loads((tmp_path / "out/latro.json").read_text())
    assert note["base"] == str(TOY) == note["args"]["reference"]
    assert note["args"]["model"] == str(shipped[0])


def test_a_reference_of_another_kind(tmp_path, capsys):
    small = shutil.copytree(TOY, tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | dict(num_hidden_layers=1)))
    flags = *TINY, "--reference", small, "--out", tmp_path / "out"
    assert latro.main([*map(str, flags)]) == 1
    line = capsys.readouterr().err
    assert f"--reference {small}" in line and "num_hidden_layers" in line
    assert not (tmp_path / "out").exists()


def test_beta_weighs_the_kl(tmp_path):
    _, row = two(tmp_path, "--beta", 5)
    assert abs(row["kl"]) > 1e-3
    assert row["reward"] == pytest.approx(row["logp_y"] - 5 * row["kl"])


def test_truncation_penalty_is_a_constant_for_what_was_cut(tmp_path):
    """Released-code defect 7: its penalty is twice a batch's mean reward: it couples questions."""
    for row in two(tmp_path, "--truncation-penalty", 3, "--L", 14, "--beta", 0, "--K", 8):
        assert 0 < row["finished"] < 1
        assert row["reward"] == pytest.approx(row["logp_y"] - 3 * (1 - row["finished"]))


def test_temperature_acts(tmp_path, default):
    """Released-code defect 8: its flag is ignored. As T goes to 0 rationales become the same, and
    pi(z|x) certain of them."""
    cold, warm = two(tmp_path, "--temperature", 0.01)[0], rows(default)[0]
    assert cold["reward_std"] < 1e-3 < warm["reward_std"]
    assert cold["entropy"] < 1e-3 < warm["entropy"]
    assert cold["kl"] == 0.0


def test_gradients_are_clipped(tmp_path, default):
    """Released-code defect 8: no clipping. A gradient far under AdamW's epsilon moves nothing."""
    ours, theirs = two(tmp_path, "--grad-clip", 1e-12), rows(default)
    assert ours[0]["grad_norm"] == theirs[0]["grad_norm"]  # logged before clipping
    assert abs(ours[1]["kl"]) < 1e-3 < abs(theirs[1]["kl"])


def test_grad_clip_0_switches_clipping_off(tmp_path):
    out, far = (start(*TINY, "--steps", 2, "--grad-clip", clip, out=tmp_path / str(clip))
                for clip in (0, 1e9))
    assert untimed(rows(out)) == untimed(rows(far))
    assert contents(out)[weights] == contents(far)[weights]


@pytest.mark.parametrize("epochs, size, questions, steps", [
    (3.0, 47, 3, 47), (0.1, 30, 1, 3), (2.0, 7, 2, 7), (1.0, 7, 2, 4), (1e-9, 7, 2, 1),
    (6.0, 7473, 24, 1869)])
def test_epochs_are_exact(epochs, size, questions, steps):
    """In floating point 3 / (3 / 47) is above 47."""
    assert latro.epochs_to_steps(epochs, size, questions) == steps


def test_no_two_uses_share_random_numbers():
    """NumPy takes the seeds (0, 1) and (0, 1, 0) for the same."""
    args = latro.parse(["--questions", "64"])
    train_set = [SimpleNamespace(place=i) for i in range(64)]
    order = [e.place for e in latro.draw_batch(train_set, 1, args)]  # all of epoch 1
    assert order != latro.rng_stream(args.seed, 1, 0).permutation(64).tolist()


def test_rate_zero_changes_no_weight(tmp_path):
    out = start(*TINY, "--steps", 1, "--lr", 0, out=tmp_path / "out")
    base, ours = load_file(TOY / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(base[k], ours[k]) for k in base)


def test_seed_changes_questions_and_rationales(tmp_path, default):
    ours, theirs = (rows(out, "samples")[1] for out in (start(*TINY, "--steps", 1, "--seed", 1,
                                                              out=tmp_path / "out"), default))
    assert ours["split"] == theirs["split"] == "train" and ours["question"] != theirs["question"]


def test_same_flags_same_run(tmp_path, default):
    again = start(*TINY, "--steps", 2, out=tmp_path / "out")
    assert untimed(rows(again)) == untimed(rows(default))
    assert contents(again)[weights] == contents(default)[weights]


@pytest.mark.parametrize("means, words, absent", [
    (dict(finished=1.0, eos=0.0), ["template 100%, EOS 0%, L 0%"], "try"),
    (dict(finished=0.75, eos=0.5), ["template 25%, EOS 50%, L 25%", "--shots", "--L"], "100%")])
def test_how_rationales_end(means, words, absent):
    line = latro.how_rationales_end(means)
    assert all(word in line for word in words)
    assert absent not in line and "\n" not in line


def test_a_run_says_how_rationales_end(tmp_path, capsys):
    """The shares of the first evaluation, once."""
    out = start(*TINY, "--steps", 1, out=tmp_path / "out")
    before = rows(out, "evals")[0]
    samples = rows(out, "samples")[0]["questions"][0]["samples"]
    assert before["eos"] == sum(s["eos"] for s in samples) / len(samples)
    assert capsys.readouterr().out.count(latro.how_rationales_end(before)) == 1


def test_sizes_act(tmp_path):
    flags = "--K 2 --L 5 --questions 3 --eval-every 1 --eval-questions 2".split()
    metrics, out = two(tmp_path, *flags), tmp_path / "out"
    assert all(row["z_len"] <= 5 for row in metrics)
    assert metrics[0]["epoch"] == pytest.approx(3 / 60)
    assert [row["step"] for row in rows(out, "evals")] == [0, 1, 2]
    assert all(row["n"] == 2 for row in rows(out, "evals"))
    train = [r for r in rows(out, "samples") if r["split"] == "train"]
    assert [len(v) for r in train for v in r.values() if isinstance(v, list)] == [2, 2]


# ---- the machine it runs on

@pytest.mark.parametrize("script", ["latro.py", "eval.py"])
def test_no_warning_of_any_library(script, tmp_path, default, monkeypatch):
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    flags = [*TINY, "--steps", 2] if script == "latro.py" else ["--ckpt", default, "--k", 2]
    code, _, errors = launch(*flags, "--out", tmp_path / "out", script=ROOT / script)
    assert code == 0 and "arning" not in errors, errors


def test_a_terminal_that_knows_only_ascii(tmp_path, monkeypatch):
    write_rows(tmp_path / "data", question="Tom\u2019s \u201c2 + 2\u201d?", answer="4", n=1)
    write_rows(tmp_path / "data", split="validation", question="Tom\u2019s?", answer="4", n=1)
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    flags = "--task", "qa", "--data", tmp_path / "data", "--model", TOY, "--steps", 1, *TINY[2:]
    code, printed, errors = launch(*flags, "--out", tmp_path / "out")
    assert code == 0 and r"Tom\u2019s?" in printed, errors


def test_a_machine_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    out = start(*TINY, "--steps", 1, out=tmp_path / "out")
    assert json.loads((out / "latro.json").read_text())["commit"] == ""


# ---- stop and go on

weights = Path("model.safetensors")
LONG = [*TINY, "--steps", 4, "--save-every", 2, "--eval-every", 3]


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """Four updates without a break."""
    return start(*LONG, out=tmp_path_factory.mktemp("full") / "out")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The same run, told by SIGTERM to stop during its second update."""
    return start(*LONG, out=tmp_path_factory.mktemp("stopped") / "out", stop=2)


def same_run(ours, theirs):
    assert untimed(rows(ours)) == untimed(rows(theirs))
    assert rows(ours, "evals") == rows(theirs, "evals")
    assert rows(ours, "samples") == rows(theirs, "samples")
    assert contents(ours)[weights] == contents(theirs)[weights]


def test_resume_after_sigterm_is_bit_equal(stopped, full, tmp_path, capsys):
    """Released-code defect 13: resuming restarts step, data order and random numbers."""
    assert [row["step"] for row in rows(stopped)] == [1, 2]
    out = shutil.copytree(stopped, tmp_path / "out")
    start("--resume", out=out)  # no other flag: those of the run are in latro.json
    same_run(out, full)


def test_resume_after_kill_drops_what_the_checkpoint_does_not_know(stopped, full, tmp_path):
    """Logs that ran ahead of the last checkpoint, a torn last line, a half-written checkpoint."""
    out = shutil.copytree(stopped, tmp_path / "out")
    for name in ("metrics", "evals", "samples"):
        later = [json.dumps(r) for r in rows(full, name) if r["step"] == 3]
        with open(out / f"{name}.jsonl", "a") as f:
            f.write("\n".join([*later, '{"step": 4, "epo']))
    for half in ("incomplete", "export"):
        (out / "state" / half).mkdir(exist_ok=True)
        (out / "state" / half / "model.safetensors").write_bytes(b"torn")
    start(*LONG, "--resume", out=out)
    same_run(out, full)


def test_resume_before_the_first_checkpoint_starts_over(full, tmp_path):
    out = shutil.copytree(full, tmp_path / "out")
    shutil.rmtree(out / "state")
    (out / "model.safetensors").unlink()
    start(*LONG, "--resume", out=out)
    same_run(out, full)


def test_resume_of_a_finished_run_changes_nothing(full, tmp_path):
    out = shutil.copytree(full, tmp_path / "out")
    start("--resume", out=out)
    same_run(out, full)


def test_a_run_goes_on_longer(full, tmp_path, monkeypatch, capsys):
    """Bit for bit a run whose learning rate was set so from the start: the same reference, moments
    and data order. It is said, recorded, and kept by the next --resume."""
    out = shutil.copytree(full, tmp_path / "out")
    start("--resume", "--steps", 6, out=out, stop=5)
    assert "from update 5 on, the learning rate is that of a run of 6 updates: 0.0001" in (
        capsys.readouterr().out)
    start("--resume", out=out)
    note = json.loads((out / "latro.json").read_text())
    assert note["schedule"] == [[0, 4], [4, 6]] and note["args"]["steps"] == 6
    learning_rate = latro.learning_rate

    def of_both(step, args):
        return learning_rate(step, dataclasses.replace(args, steps=4 if step < 4 else 6))
    monkeypatch.setattr(latro, "learning_rate", of_both)
    other = start(*LONG, "--steps", 6, out=tmp_path / "other")
    assert untimed(rows(out)) == untimed(rows(other)) and len(rows(out)) == 6
    assert contents(out)[weights] == contents(other)[weights]


def test_a_run_cannot_become_shorter_than_it_is(full, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(full, tmp_path / "out")
    before = contents(out)
    assert latro.main(["--resume", "--steps", "3", "--out", str(out)]) == 1
    assert "--steps 3" in capsys.readouterr().err
    assert {k: v for k, v in contents(out).items() if k in before} == before


class Killed(BaseException):
    """Stands for kill -9."""


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "step-000002"])
def test_kill_while_saving_loses_nothing(name, tmp_path, monkeypatch):
    """The second save dies before the rename that makes a file current. Then out/ holds a whole
    model, of one update or the other, and --resume ends where an undisturbed run does."""
    flags = [*TINY, *"--questions 1 --K 2 --L 4 --steps 2 --save-every 1".split()]
    out, whole = start(*flags, out=tmp_path / "out", stop=1), start(*flags, out=tmp_path / "whole")
    before, after = contents(out)[weights], contents(whole)[weights]
    replace = os.replace

    def fragile(source, target):
        if os.path.basename(target) == name:
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", fragile)
        start("--resume", out=out)
    assert contents(out)[weights] in (before, after)
    AutoModelForCausalLM.from_pretrained(out)
    start("--resume", out=out)
    assert untimed(rows(out)) == untimed(rows(whole))
    assert before != after and contents(out)[weights] == after


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.slow
def test_signal_finishes_the_update_and_says_how_to_go_on(number, tmp_path):
    out = tmp_path / "out"
    with under_way(out) as run:
        run.send_signal(number)
        printed, errors = run.communicate(timeout=60)
    assert run.returncode == 0, errors
    assert f"--resume --out {out}" in printed
    last = rows(out)[-1]["step"]
    assert 0 < last < 5000 and (out / "state" / f"step-{last:06d}").is_dir()
    AutoModelForCausalLM.from_pretrained(out)


def test_samples_are_those_of_the_question(tmp_path, monkeypatch):
    """In whatever order trees are scored: by size, here one at a time."""
    drawn, rollout = [], latro.rollout

    def spy(*args, **how):
        drawn.append(rollout(*args, **how))
        return drawn[-1]
    monkeypatch.setattr(latro, "rollout", spy)
    monkeypatch.setattr(latro, "evaluate_and_log", lambda *_: None)
    monkeypatch.setattr(latro, "before_and_after", lambda _: "")
    flags = "--questions 4 --steps 4 --micro 1".split()
    logged = rows(start(*TINY, *flags, out=tmp_path / "out"), "samples")
    lengths = [[[len(r.actions) for r in group] for group in groups] for groups in drawn]
    assert [[s["actions"] for s in row["samples"]] for row in logged] == [own[0] for own in lengths]
    assert any(sum(own[0]) < max(map(sum, own)) for own in lengths)
