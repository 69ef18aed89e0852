"""Proves that the peers do the same job: rewards, gradients, questions and evaluations agree."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import TINY, gradients, rows

import latro
from experiments import peer, trainers
from harness.data import load_datasets
from harness.distributed import init_distributed

SMALL = [*TINY, *"--questions 2 --K 2 --L 16 --steps 2 --eval-questions 3".split()]
needs_trl = pytest.mark.skipif(not find_spec("trl"), reason="not installed: trl")


@pytest.fixture
def job(tmp_path):
    """(args, codec, training questions, policy, reference) of a small run, which learns from its
    score function alone."""
    args = latro.parse([*SMALL, "--answer-weight", "0", "--out", str(tmp_path / "run")])
    codec, train_set, _ = load_datasets(args)
    yield args, codec, train_set, *latro.load_policies(args, init_distributed())
    dist.destroy_process_group()


def distance(found, expected):
    """Of two lists of tensors, relative to the second."""
    apart = sum(float((a - b).norm()) ** 2 for a, b in zip(found, expected, strict=True))
    return (apart / sum(float(b.norm()) ** 2 for b in expected)) ** 0.5


def samples(policy, codec, batch, L):
    """Eight rationales per question, as latro.sample_rationales returns them; one ends by EOS."""
    uniform = torch.rand(8 * len(batch), L, generator=torch.Generator().manual_seed(0),
                         dtype=torch.float64)
    drawn = latro.sample_rationales(policy, [e.x for e in batch], codec.stops, codec.eos, 8, L,
                                    uniform)
    return [([*drawn[0][0][:5], codec.eos[0]], 6, -1), *drawn[1:]]


def test_a_rationale_ends_where_latro_ends_it(job):
    """Whatever follows. By template, EOS and L."""
    args, codec, train_set, policy, _ = job
    drawn, stops = samples(policy, codec, train_set[:4], 16), codec.stops.tolist()
    assert {reason for *_, reason in drawn} == {3, 0, -1}
    for ids, end, reason in drawn:
        assert trainers.where_z_ends(stops, codec.eos, ids) == (end, reason)
        if reason:
            assert trainers.where_z_ends(stops, codec.eos, ids + [39, *ids]) == (end, reason)


def test_reward(job):
    """It is log p(y|x+z) of latro.score, for every kind of end."""
    args, codec, train_set, policy, reference = job
    batch = train_set[:4]
    drawn = samples(policy, codec, batch, 16)
    groups = [[latro.split_rollout(codec, *one, example.answer, args.credit)
               for one in drawn[8 * i:8 * i + 8]] for i, example in enumerate(batch)]
    expected = latro.score(policy, reference, batch, groups, args)[1].logp_y
    policy.set_attn_implementation("sdpa")
    reward = trainers.make_reward(policy, codec, args, train_set)
    found = reward(completion_ids=[ids for ids, *_ in drawn], place=[i // 8 for i in range(32)])
    assert torch.allclose(torch.tensor(found), expected, rtol=0, atol=1e-4)
    assert expected.std() > 1


@needs_trl
@pytest.mark.parametrize("grad_clip", [1.0, 1e6])
def test_trl_has_the_gradient_of_latro_without_its_answer_term(job, grad_clip):
    """In both updates, with clipping and without. So its advantages, KL, loss, learning rate and
    order of questions are those of latro.py."""
    from transformers import TrainerCallback
    args, codec, train_set, policy, reference = job
    args.grad_clip = grad_clip
    batches, seen, found = [latro.draw_batch(train_set, step, args) for step in (0, 1)], [], []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *_, model, optimizer, **__):
            found.append(([p.grad.clone() for p in model.parameters()],
                          optimizer.param_groups[0]["lr"]))

    setting, record = dict(rows=2, cache="static", attention="eager"), trainers.Record(args)
    trainer = trainers.trl_trainer(args, codec, batches, setting, record)
    [reward] = trainer.reward_funcs

    def recording_reward(**columns):
        seen.append(columns)
        return reward(**columns)
    trainer.reward_funcs = [recording_reward]
    trainer.add_callback(Look())
    trainer.train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0)
    finish = trainers.make_finish(codec, args)
    for step, (batch, columns, (gradient, lr)) in enumerate(zip(batches, seen, found, strict=True)):
        assert columns["place"] == [2 * step, 2 * step, 2 * step + 1, 2 * step + 1]
        assert columns["prompts"] == [codec.prompt(e.question) for e in batch for _ in range(2)]
        drawn = iter(columns["completion_ids"])
        groups = [[finish(example, next(drawn)) for _ in range(2)] for example in batch]
        assert all(one.actions == one.ids for group in groups for one in group)
        logp, scores = latro.score(policy, reference, batch, groups, args)
        (-(scores.token_weights * logp).sum()).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), args.grad_clip)
        assert distance(gradient, gradients(policy)) < 1e-3
        assert latro.optimizer_step(policy, optimizer, step, args)[1] == pytest.approx(lr)
    assert max(len(ids) for columns in seen for ids in columns["completion_ids"]) == args.L
    ours, theirs, base = (torch.cat([w.flatten() for w in weights.values()]) for weights in (
        policy.state_dict(), record.weights[2], reference.state_dict()))
    assert distance([theirs - base], [ours - base]) < 0.02


def test_the_released_procedure(job, monkeypatch):
    """Every row decodes L tokens, also after EOS; z is cut from them. Updates follow the schedule
    of latro.py."""
    args, codec, train_set, *_ = job
    args.L, steps, optimizer_step = 48, [], latro.optimizer_step
    loop = trainers.ReleasedUpdate(trainers.Job(args, codec))
    loop.work.batch = train_set[:2]
    drawn = loop.sample(use_uniform=False)
    groups = loop.work.finish(drawn)
    assert [len(ids) for ids in drawn] == [48] * 4
    assert any(any(ids[ids.index(codec.eos[0]) + 1:]) for ids in drawn if codec.eos[0] in ids)
    assert all(one.ids == ids and len(one.actions) < 48
               for one, ids in zip(sum(groups, []), drawn, strict=True))

    def recording_step(policy, optimizer, step, args):
        steps.append(step)
        return optimizer_step(policy, optimizer, step, args)
    monkeypatch.setattr(latro, "optimizer_step", recording_step)
    batches, record = [train_set[:2], train_set[2:4]], trainers.Record(args)
    trainers.train_released(args, codec, batches, {}, record)
    assert steps == [0, 1] and [*record.weights] == [2]
    assert all(min(seconds.values()) > 0 for seconds in record.seconds)


@pytest.mark.parametrize("values, seconds", [
    ([0.2, 0.5, 1.0], 19.0),  # 0.95 lies at nine tenths of the last piece
    ([0.2, 0.95, 0.3, 1.0], 10.0), ([0.2, 1.0, 0.1, 0.8], 7.0), ([0.9, 0.8], 0.0)])
def test_seconds_to_reach(values, seconds):
    times = [10.0 * i for i in range(len(values))]
    assert peer.seconds_to_reach(times, values, 0.95) == pytest.approx(seconds)


def test_table():
    """Ranges over seeds. A ratio compares runs of the same seed, and needs a time other than 0."""
    def run(total, *greedy):
        return dict(seconds=[0.0, total / 2, total], greedy=[*greedy], sampled=[0.9, 0.5, 0.8],
                    logp_y=[-3.0, -2.0, -0.25])
    text = peer.table({peer.OURS: [run(10.0, 0, 0.5, 1.0), run(20.0, 0, 0.5, 1.0)],
                       peer.TRL: [run(30.0, 0, 1.0, 1.0), run(40.0, 0, 0, 1.0)]})
    heads, _, ours, other = [line[2:-2].split(" | ") for line in text.splitlines()]
    assert len(heads) == len(ours)
    assert ours == ["LaTRO", "2", "1.000", "0.800", "-0.25", "10.0 to 20.0", "1.00", "9.5 to 19.0",
                    "1.00", "0.0", "-"]
    assert other[5:] == ["30.0 to 40.0", "2.00 to 3.00", "14.2 to 39.0", "1.50 to 2.05", "0.0", "-"]


@pytest.fixture
def command(tmp_path, monkeypatch):
    """A small run of the whole command in this process. Returns where it writes."""
    monkeypatch.setattr(peer, "in_new_process", lambda threads, function, *args: function(*args))
    monkeypatch.setattr(peer, "PROBE", ["--steps", "2", "--eval-every", "0"])
    monkeypatch.setattr(peer, "SETTINGS", {
        peer.OURS: [dict(threads=1)], peer.SAME: [dict(threads=1)],
        peer.TRL: [dict(threads=1, rows=4, cache="dynamic", attention="sdpa")],
        peer.RELEASED: [dict(threads=1), dict(threads=2)]})
    monkeypatch.setattr(sys, "argv", [
        "peer.py", "--seeds", "1", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path),
        "--pictures", str(tmp_path), "--", *SMALL, "--eval-every", "1"])
    return tmp_path


@needs_trl
@pytest.mark.slow
def test_command(command, monkeypatch):
    """It writes the record, the table and the figure. All trainers are evaluated alike. A second
    call runs nothing; a run that was stopped begins anew."""
    stopped = command / "runs" / "TRL_RLOOTrainer.0"
    stopped.mkdir(parents=True)
    (stopped / "metrics.jsonl").write_text('{"step": 7, "seconds": {"update": 1.0}}\n')
    peer.main()
    ours, *others = [command / "runs" / f"{name}.0" for name in (
        "LaTRO", "LaTRO_answer_weight_0", "TRL_RLOOTrainer", "released_procedure")]
    for out in others:
        (before, *after), (same, *_) = rows(out, "evals"), rows(ours, "evals")
        assert before == same and [row["step"] for row in after] == [1, 2]
        assert after[0]["logp_y"] != after[1]["logp_y"] != before["logp_y"]
        assert [row["step"] for row in rows(out)] == [1, 2]
    record = json.loads((command / "peer.json").read_text())
    assert [len(probes) for probes in record["probes"].values()] == [1, 1, 1, 2]
    for name, [curve] in record["curves"].items():
        first, second = peer.seconds_of_updates(peer.run_dir(command / "runs", name, 0))
        assert curve["seconds"] == pytest.approx([0, first, first + second])
    heads, _, *lines = (command / "peer.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines] == [f"| {name}" for name in peer.SETTINGS]
    assert lines[0].count(" 1.00 |") >= 1 and heads.count("x LaTRO") == 3
    assert (command / "peer.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(peer, "in_new_process", None)
    peer.main()


@needs_trl
def test_a_run_that_has_not_ended(command, monkeypatch):
    """It does not count as finished: neither one that failed nor one that was told to stop."""
    def stopped(threads, train, name, setting, flags):
        out = Path(flags[flags.index("--out") + 1])
        out.mkdir(parents=True)
        (out / "evals.jsonl").write_text('{"step": 1}\n')
        return 0
    for process in (stopped, lambda *_: 1):
        monkeypatch.setattr(peer, "in_new_process", process)
        with pytest.raises(SystemExit, match="finished runs are kept"):
            peer.main()
    assert not [*command.rglob("setting.json")]


def threads_as_exit_code():
    return 40 + torch.get_num_threads()


@pytest.mark.slow
def test_a_new_process():
    """It has so many threads, and its exit code is that of the function."""
    assert peer.in_new_process(2, threads_as_exit_code) == 42


def test_without_trl(command, monkeypatch):
    """One sentence, before anything is run."""
    monkeypatch.setattr(peer, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install"):
        peer.main()
    assert not Path(command, "runs").exists()
