"""How a run is split changes nothing: processes, micro-batches, checkpointing and replicas give the
same questions, rationales, gradients and evaluations; any number of processes can resume it.

Gradients are those of the real training loop, whole, at the second update: there the policy has
moved away from the reference, so every term of the objective is at work. All float32, over gloo.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from conftest import TINY, TOY, contents, gradients, launch, rows, start, stopping, untimed

import latro  # after conftest, which knows where it is: this file is also a script
from kernels import conclude

FLAGS = [*TINY, *"--questions 4 --K 3 --L 24 --eval-questions 5 --steps 2 --lr 1e-4".split()]
WEIGHTS = Path("model.safetensors")


def recording(update):
    """latro.update, and before it the whole gradient, saved by the first process."""
    def wrapped(policy, optimizer, step, args):
        whole = gradients(policy)
        if distributed.is_main_process():
            torch.save([g.clone() for g in whole], Path(args.out, f"gradient-{step + 1}.pt"))
        return update(policy, optimizer, step, args)
    return wrapped


def short(rollout):
    """latro.rollout, but the questions of every second slot are answered at once: all that the last
    of two processes draws is an EOS."""
    def wrapped(policy, codec, batch, slots, stream, args, K, *rest, **more):
        groups = rollout(policy, codec, batch, slots, stream, args, K, *rest, **more)
        silent = [[conclude(codec, codec.eos[:1], 1, -1, e.answer, args.credit)] * K for e in batch]
        return [s if slot % 2 else g for slot, g, s in zip(slots, groups, silent)]
    return wrapped


def work(jobs):
    """Runs of latro.py one after the other, each (flags, update in which the last process is told
    to stop, or None), with their gradients left in --out."""
    update, rollout = latro.optimizer_step, latro.rollout
    last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
    for flags, stop in jobs:
        latro.optimizer_step = stopping(recording(update), stop) if stop and last else recording(update)
        latro.rollout = short(rollout) if Path(flags[-1]).name in SHORT else rollout
        try:
            assert not latro.main([*map(str, flags)])
        finally:
            latro.optimizer_step, latro.rollout = update, rollout


def work_as_torchrun(processes, jobs, folder):
    """The same in several processes: this file is the script."""
    path = Path(folder, "jobs.json")
    path.write_text(json.dumps([([*map(str, flags)], stop) for flags, stop in jobs]))
    code, _, errors = launch(path, processes=processes, script=Path(__file__))
    assert code == 0, errors[-3000:]


def begun(folder, model, **other):
    """A function that copies a run stopped after its first update, to go on from in many ways."""
    first = start(*FLAGS, *model, out=folder / "first", stop=1)

    def copy(name, **settings):
        out = shutil.copytree(first, folder / name)
        notes = json.loads((out / "latro.json").read_text())
        notes["args"] |= dict(out=str(out)) | settings
        (out / "latro.json").write_text(json.dumps(notes))
        return out
    return copy


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Flags of the toy, whose embeddings are tied, and of a Llama of grouped heads, where not."""
    path = tmp_path_factory.mktemp("untied")
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, eos_token_id=1,
        tie_word_embeddings=False, max_position_embeddings=256)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return dict(tied=[], untied=["--model", path, "--task", "toy"])


WAYS = {  # of one process
    "one a pass": dict(micro=1), "some a pass": dict(micro=250),
    "checkpointing": dict(checkpointing=True),
    "checkpointing, one a pass": dict(checkpointing=True, micro=1)}
SHORT = "short", "short-in-two"  # where half of the questions get no rationale
TWO = {"2 processes": {},
       "2 processes, checkpointing, one a pass": dict(checkpointing=True, micro=1),
       "2 copies, one a pass": dict(shard=1, micro=1)}
FOUR = {"4 processes, 2 copies": dict(shard=2)}


@pytest.fixture(scope="module")
def outs(models, tmp_path_factory):
    """{(model, way): out}: the second update, done in all ways from the same first one. With two
    processes also whole runs, and runs that stop and go on."""
    folder = tmp_path_factory.mktemp("distributed")
    made, jobs = {}, {1: [], 2: [], 4: []}
    for model, flags in models.items():
        (folder / model).mkdir()
        copy = begun(folder / model, flags)
        for processes, ways in {1: {"one": {}, SHORT[0]: {}} | WAYS, 2: TWO | {SHORT[1]: {}},
                                4: FOUR}.items():
            for way, settings in ways.items():
                made[model, way] = out = copy(way.replace(" ", "-"), **settings)
                jobs[processes].append((["--resume", "--out", out], None))
    for processes in (1, 2):
        for name, stop in dict(run=None, stopped=2).items():
            made[name, processes] = out = folder / f"{name}-{processes}"
            jobs[processes].append(([*FLAGS, "--steps", 4, "--out", out], stop))
    work(jobs[1])
    made["1 to 2"] = shutil.copytree(made["stopped", 1], folder / "1-to-2")
    jobs[2].append((["--resume", "--out", made["1 to 2"]], None))
    work_as_torchrun(2, jobs[2], folder)
    work_as_torchrun(4, jobs[4], folder)
    return made


def gradient(out, step=2):
    return torch.cat([g.flatten() for g in torch.load(out / f"gradient-{step}.pt")])


def distance(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


def close(ours, theirs, rel=1e-5):
    """Rows of logs: the same words, the same numbers but for rounding."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            close(ours[key], theirs[key], rel)
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for pair in zip(ours, theirs):
            close(*pair, rel)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=rel, abs=1e-5)
    else:
        assert ours == theirs


@pytest.mark.parametrize("W", [1, 2, 4, 8])
@pytest.mark.parametrize("budget", [1, 900, 4000, 10**6])
def test_dealt(W, budget, monkeypatch):
    """Each tree once; as many passes on each process, within the budget unless of one tree; and at
    the same time none over much more than another: by less than the trees differ."""
    monkeypatch.setattr(latro, "world_size", lambda: W)
    sizes = torch.randint(200, 800, (48,), generator=torch.Generator().manual_seed(W)).tolist()
    hands = []
    for rank in range(W):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        hands.append(distributed.assign_micro_batches(sizes, budget))
    assert sorted(i for hand in hands for some in hand for i in some) == [*range(48)]
    loads = [[sum(sizes[i] for i in some) for some in hand] for hand in hands]
    for at_once, passes in zip(zip(*loads, strict=True), zip(*hands)):
        assert len({*map(len, passes)}) == 1
        assert max(at_once) <= budget or len(passes[0]) == 1
        assert max(at_once) - min(at_once) <= max(sizes) - min(sizes)
    filled = [sum(at_once) / W for at_once in zip(*loads)]
    assert all(a + b > 0.9 * budget for a, b in zip(filled, filled[1:]))  # no pass for nothing


@pytest.mark.parametrize("way", [*WAYS, *TWO, *FOUR])
@pytest.mark.parametrize("model", ["tied", "untied"])
def test_gradient_is_the_same(model, way, outs):
    ours, theirs = gradient(outs[model, way]), gradient(outs[model, "one"])
    assert theirs.norm() > 0.1
    assert distance(ours, theirs) < 1e-5
    ours, theirs = rows(outs[model, way])[1], rows(outs[model, "one"])[1]
    assert abs(theirs["kl"]) > 1e-4
    close(untimed([ours]), untimed([theirs]))


@pytest.mark.parametrize("model", ["tied", "untied"])
def test_a_process_with_shorter_rationales(model, outs):
    """It has done with decoding at once, and waits for the other without harm."""
    one, two = (outs[model, way] for way in SHORT)
    assert distance(gradient(two), gradient(one)) < 1e-5
    close(untimed([rows(two)[1]]), untimed([rows(one)[1]]))
    assert rows(two)[1]["z_len"] < 0.6 * rows(outs[model, "one"])[1]["z_len"]


def test_first_update_and_evaluation_are_the_same(outs):
    """The same questions and rationales: randomness hangs on the slot of a question, not on who
    draws it. Five held-out questions do not divide by two."""
    one, two = outs["run", 1], outs["run", 2]
    assert distance(gradient(two, 1), gradient(one, 1)) < 1e-5
    close(untimed(rows(two)[:1]), untimed(rows(one)[:1]))
    close(rows(two, "samples")[:2], rows(one, "samples")[:2])  # evaluation, update
    close(rows(two, "evals")[:1], rows(one, "evals")[:1])
    assert rows(two, "evals")[0]["n"] == 5


def test_saved_model_is_whole(outs):
    """Not a shard of it: the weights of two processes are those of one, but for rounding that Adam
    makes larger."""
    one, two = (load_file(outs["tied", way] / WEIGHTS) for way in ("one", "2 processes"))
    assert one.keys() == two.keys()
    assert distance(*(torch.cat([w.flatten() for w in m.values()]) for m in (two, one))) < 1e-4


def test_one_process_is_told_to_stop_and_all_do(outs):
    assert [row["step"] for row in rows(outs["stopped", 2])] == [1, 2]
    assert untimed(rows(outs["stopped", 2])) == untimed(rows(outs["run", 2]))[:2]


def test_resume_with_as_many_processes_is_bit_equal(outs, tmp_path):
    """The script itself, under torchrun. Released-code defect 13: resuming restarts step, data
    order and random numbers."""
    out = shutil.copytree(outs["stopped", 2], tmp_path / "out")
    code, _, errors = launch("--resume", "--out", out, processes=2)
    assert code == 0, errors[-3000:]
    assert untimed(rows(out)) == untimed(rows(outs["run", 2]))
    assert rows(out, "evals") == rows(outs["run", 2], "evals")
    assert contents(out)[WEIGHTS] == contents(outs["run", 2])[WEIGHTS]


def test_resume_with_other_numbers_of_processes(outs, tmp_path):
    fewer = start("--resume", out=shutil.copytree(outs["stopped", 2], tmp_path / "out"))
    for ours, theirs in ((fewer, outs["run", 2]), (outs["1 to 2"], outs["run", 1])):
        assert [row["step"] for row in rows(ours)] == [1, 2, 3, 4]
        assert untimed(rows(ours))[:2] == untimed(rows(theirs))[:2]
        close(untimed(rows(ours))[2], untimed(rows(theirs))[2], rel=1e-2)  # Adam enlarges rounding


if __name__ == "__main__":
    device = distributed.init_distributed()  # one group for all jobs
    distributed.init_distributed = lambda *_: device
    leave, dist.destroy_process_group = dist.destroy_process_group, lambda: None
    work(json.loads(Path(sys.argv[1]).read_text()))
    dist.barrier()
    leave()
