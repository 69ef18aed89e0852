"""Proves that splitting a run changes nothing: questions, rationales, gradients and evaluations are
the same for any number of processes, micro-batches and copies of the weights, and with
checkpointing; and any number of processes can resume it.

Gradients are whole, and those of the real training loop in its second update. There the policy
differs from the reference, so every term of the objective counts. All of it in float32, over gloo.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import (AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, LlamaConfig,
                          MixtralConfig)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this file is also a script
from conftest import (TINY, TOY, contents, gradients, launch, launch_jobs, one_process_group, rows,
                      start, stopping, untimed)

import latro  # after conftest, which puts the repository on the path
from harness import distributed

FLAGS = [*TINY, *"--questions 4 --K 3 --L 24 --eval-questions 5 --steps 2 --lr 1e-4".split()]
WEIGHTS = Path("model.safetensors")


def recording(optimizer_step):
    """latro.optimizer_step; before it, the main process saves the whole gradient."""
    def wrapped(policy, optimizer, step, args):
        whole = gradients(policy)  # on every process: it is gathered
        if distributed.is_main_process():
            torch.save([g.clone() for g in whole], Path(args.out, f"gradient-{step + 1}.pt"))
        return optimizer_step(policy, optimizer, step, args)
    return wrapped


def half_empty(rollout):
    """latro.rollout, except that every second question gets empty rationales: the last of two
    processes draws only EOS."""
    def wrapped(policy, codec, examples, question_ids, step, args, *rest, **options):
        groups = rollout(policy, codec, examples, question_ids, step, args, *rest, **options)
        empty = [latro.split_rollout(codec, codec.eos[:1], 1, -1, e.answer, args.credit)
                 for e in examples]
        return [[one] * len(group) if i % 2 else group
                for i, group, one in zip(question_ids, groups, empty)]
    return wrapped


def run_jobs(jobs):
    """Runs of latro.py, one after the other. A job is (flags, the update in which the last process
    is told to stop, or None). Each run leaves its gradients in --out, its last flag."""
    optimizer_step, rollout = latro.optimizer_step, latro.rollout
    last_process = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
    for flags, stop in jobs:
        recorded = recording(optimizer_step)
        latro.optimizer_step = stopping(recorded, stop) if stop and last_process else recorded
        latro.rollout = half_empty(rollout) if Path(flags[-1]).name in HALF_EMPTY else rollout
        try:
            assert not latro.main([*map(str, flags)])
        finally:
            latro.optimizer_step, latro.rollout = optimizer_step, rollout


def one_update(folder, model_flags):
    """A function that copies a run of one update and changes its settings, to resume it."""
    first = start(*FLAGS, *model_flags, out=folder / "first", stop=1)

    def copy(name, **settings):
        out = shutil.copytree(first, folder / name)
        note = json.loads((out / "latro.json").read_text())
        note["args"] |= dict(out=str(out)) | settings
        (out / "latro.json").write_text(json.dumps(note))
        return out
    return copy


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Flags of the toy, with tied embeddings, and of random models with grouped heads, without:
    a Llama, one with a window of 6 in one layer of two, and one with experts."""
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    sizes = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48,
                 num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 initializer_range=0.2, eos_token_id=1, tie_word_embeddings=False,
                 max_position_embeddings=256)
    kinds = ["sliding_attention", "full_attention"]
    configs = dict(
        untied=LlamaConfig(**sizes), experts=MixtralConfig(**sizes, num_local_experts=4),
        windows=Gemma3TextConfig(**sizes, head_dim=8, sliding_window=6, layer_types=kinds))
    flags = dict(tied=[])
    for name, config in configs.items():
        path = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
        tokenizer.save_pretrained(path)
        flags[name] = ["--model", path, "--task", "toy"]
    return flags


# Settings of the second update, by number of processes.
WAYS = {
    "one tree a pass": dict(micro=1), "some trees a pass": dict(micro=250),
    "checkpointing": dict(checkpointing=True),
    "checkpointing, one tree a pass": dict(checkpointing=True, micro=1)}
TWO = {"2 processes": {},
       "2 processes, checkpointing, one tree a pass": dict(checkpointing=True, micro=1),
       "2 copies, one tree a pass": dict(shard=1, micro=1)}
FOUR = {"4 processes, 2 copies": dict(shard=2)}
HALF_EMPTY = "half-empty", "half-empty-by-two"  # half of the questions get empty rationales


@pytest.fixture(scope="module")
def outs(models, tmp_path_factory):
    """{(model, way): out}: the second update in all ways, from the same first one. Also
    {(name, processes): out} and "1 to 2": whole runs, and runs that stop and resume."""
    folder = tmp_path_factory.mktemp("distributed")
    outs, jobs = {}, {1: [], 2: [], 4: []}
    ways = {1: {"one": {}, HALF_EMPTY[0]: {}} | WAYS, 2: TWO | {HALF_EMPTY[1]: {}}, 4: FOUR}
    for model, flags in models.items():
        (folder / model).mkdir()
        copy = one_update(folder / model, flags)
        for processes, variants in ways.items():
            for way, settings in variants.items():
                outs[model, way] = out = copy(way.replace(" ", "-"), **settings)
                jobs[processes].append((["--resume", "--out", out], None))
    for processes in (1, 2):
        for name, stop in dict(run=None, stopped=2).items():
            outs[name, processes] = out = folder / f"{name}-{processes}"
            jobs[processes].append(([*FLAGS, "--steps", 4, "--out", out], stop))
    run_jobs(jobs[1])
    outs["1 to 2"] = shutil.copytree(outs["stopped", 1], folder / "1-to-2")
    jobs[2].append((["--resume", "--out", outs["1 to 2"]], None))
    for processes in (2, 4):
        launch_jobs(__file__, jobs[processes], processes, folder)
    return outs


def gradient(out, step=2):
    return torch.cat([g.flatten() for g in torch.load(out / f"gradient-{step}.pt")])


def relative_error(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


def assert_close(ours, theirs, rel=1e-5):
    """Rows of logs are equal, numbers except for rounding."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            assert_close(ours[key], theirs[key], rel)
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for pair in zip(ours, theirs):
            assert_close(*pair, rel)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=rel, abs=1e-5)
    else:
        assert ours == theirs


@pytest.mark.parametrize("W", [1, 2, 4, 8])
@pytest.mark.parametrize("budget", [1, 900, 4000, 10**6])
def test_assign_micro_batches(W, budget, monkeypatch):
    """Each tree is assigned once. Every process makes the same number of passes with the same
    numbers of trees, within the budget unless a pass has one tree. The passes made at the same time
    differ in size by less than the trees do."""
    monkeypatch.setattr(distributed, "processes", lambda: W)
    sizes = torch.randint(200, 800, (48,), generator=torch.Generator().manual_seed(W)).tolist()
    assigned = []
    for rank in range(W):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        assigned.append(distributed.assign_micro_batches(sizes, budget))
    assert sorted(i for passes in assigned for trees in passes for i in trees) == [*range(48)]
    tokens = [[sum(sizes[i] for i in trees) for trees in passes] for passes in assigned]
    for at_once, passes in zip(zip(*tokens, strict=True), zip(*assigned)):
        assert len({*map(len, passes)}) == 1
        assert max(at_once) <= budget or len(passes[0]) == 1
        assert max(at_once) - min(at_once) <= max(sizes) - min(sizes)
    means = [sum(at_once) / W for at_once in zip(*tokens)]
    assert all(a + b > 0.9 * budget for a, b in zip(means, means[1:]))  # no pass could be saved


@pytest.mark.parametrize("way", [*WAYS, *TWO, *FOUR])
@pytest.mark.parametrize("model", ["tied", "untied", "experts", "windows"])
@pytest.mark.slow
def test_gradient_is_the_same(model, way, outs):
    ours, expected = gradient(outs[model, way]), gradient(outs[model, "one"])
    assert expected.norm() > 0.1
    assert relative_error(ours, expected) < 1e-5
    ours, expected = rows(outs[model, way])[1], rows(outs[model, "one"])[1]
    assert abs(expected["kl"]) > 1e-4
    assert_close(untimed([ours]), untimed([expected]))


@pytest.mark.parametrize("model", ["tied", "untied"])
@pytest.mark.slow
def test_a_process_with_shorter_rationales(model, outs):
    """It ends decoding at once and waits for the other one."""
    one, two = (outs[model, way] for way in HALF_EMPTY)
    assert relative_error(gradient(two), gradient(one)) < 1e-5
    assert_close(untimed([rows(two)[1]]), untimed([rows(one)[1]]))
    assert rows(two)[1]["z_len"] < 0.6 * rows(outs[model, "one"])[1]["z_len"]


@pytest.mark.slow
def test_first_update_and_evaluation_are_the_same(outs):
    """The same questions and rationales: samples depend on the question, not on the process that
    draws them. Five held-out questions do not divide by two."""
    one, two = outs["run", 1], outs["run", 2]
    assert relative_error(gradient(two, 1), gradient(one, 1)) < 1e-5
    assert_close(untimed(rows(two)[:1]), untimed(rows(one)[:1]))
    assert_close(rows(two, "samples")[:2], rows(one, "samples")[:2])  # evaluation, update
    assert_close(rows(two, "evals")[:1], rows(one, "evals")[:1])
    assert rows(two, "evals")[0]["n"] == 5


@pytest.mark.slow
def test_saved_model_is_whole(outs):
    """Two processes save whole weights, not a shard: those of one process, except for rounding,
    which Adam enlarges."""
    one, two = (load_file(outs["tied", way] / WEIGHTS) for way in ("one", "2 processes"))
    assert one.keys() == two.keys()
    ours, expected = (torch.cat([w.flatten() for w in m.values()]) for m in (two, one))
    assert relative_error(ours, expected) < 1e-4


@pytest.mark.slow
def test_all_processes_stop_when_one_is_told_to(outs):
    assert [row["step"] for row in rows(outs["stopped", 2])] == [1, 2]
    assert untimed(rows(outs["stopped", 2])) == untimed(rows(outs["run", 2]))[:2]


@pytest.mark.slow
def test_resume_with_the_same_number_of_processes_is_bit_equal(outs, tmp_path):
    """latro.py itself, under torchrun. Released-code defect 13: resuming restarts step, data order
    and random numbers."""
    out = shutil.copytree(outs["stopped", 2], tmp_path / "out")
    code, _, errors = launch("--resume", "--out", out, processes=2)
    assert code == 0, errors[-3000:]
    assert untimed(rows(out)) == untimed(rows(outs["run", 2]))
    assert rows(out, "evals") == rows(outs["run", 2], "evals")
    assert contents(out)[WEIGHTS] == contents(outs["run", 2])[WEIGHTS]


@pytest.mark.slow
def test_resume_with_other_numbers_of_processes(outs, tmp_path):
    fewer = start("--resume", out=shutil.copytree(outs["stopped", 2], tmp_path / "out"))
    for ours, theirs in ((fewer, outs["run", 2]), (outs["1 to 2"], outs["run", 1])):
        assert [row["step"] for row in rows(ours)] == [1, 2, 3, 4]
        assert untimed(rows(ours))[:2] == untimed(rows(theirs))[:2]
        # Adam enlarges rounding.
        assert_close(untimed(rows(ours))[2], untimed(rows(theirs))[2], rel=1e-2)


if __name__ == "__main__":
    with one_process_group():
        run_jobs(json.loads(Path(sys.argv[1]).read_text()))
