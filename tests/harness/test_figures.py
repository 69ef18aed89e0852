"""Proves that the figures' numbers follow their definitions, and that no picture is blank."""

import dataclasses
import json
import random
import sys
from itertools import combinations
from math import comb
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
import torch.distributed as dist

import eval as grading
import latro
from harness import data, distributed, statistics
from conftest import HELD, TINY, start
from harness.answers import majority, same_answer, strict

NAMES = "curves", "length", "likelihood", "votes"


@pytest.mark.parametrize("right", range(6))
def test_pass(right):
    """Unbiased: the share of all subsets that hold a right sample."""
    samples = [i < right for i in range(5)]
    for k, estimate in enumerate(statistics.pass_at_k(samples), 1):
        subsets = [*combinations(samples, k)]
        share = fmean(map(any, subsets))
        assert estimate == pytest.approx(share, abs=1e-12)
        assert len(subsets) == comb(5, k)


def voter(said, gold="18"):
    return dict(gold=gold, samples=[dict(said=s, right=same_answer(s, gold)) for s in said])


@pytest.mark.parametrize("said", [
    ["18.", "5", "5", "18"], ["5", "18", "18.0", "5.0"], ["", "", "18", "7"], ["", "", "", ""],
    ["7", "18", "", "9"], ["18", "18", "18", "18"], ["3", "4", "5", "18"]])
def test_votes(said):
    """Each share is that of answers.majority on subsets in the order given. One sample gives the
    accuracy, all give the table's vote, whatever the order; the first of a tie wins."""
    row, K = voter(said), len(said)

    def wins(some):
        return same_answer(majority([said[i] for i in some]), "18")
    for seed in range(8):
        order = np.random.default_rng(seed).permutation(K)
        shares = grading.majorities(row, order.tolist())
        for k, share in enumerate(shares, 1):
            ring = [sorted(order[(i + j) % K] for j in range(k)) for i in range(K)]
            assert share == fmean(map(wins, ring))
        assert shares[0] == fmean(s["right"] for s in row["samples"])
        assert shares[-1] == wins(range(K))


def test_votes_are_unbiased():
    """Over all orders of the ring, maj@k is the mean over all subsets of k samples."""
    draw, said = random.Random(0), ["18", "5", "18.", "", "7", "5"]
    orders = [draw.sample(range(6), 6) for _ in range(3000)]
    means = np.mean([grading.majorities(voter(said), o) for o in orders], axis=0)
    for k in range(1, 7):
        verdicts = [same_answer(majority([*some]), "18") for some in combinations(said, k)]
        assert means[k - 1] == pytest.approx(fmean(verdicts), abs=0.02)


@pytest.fixture
def toy(tmp_path):
    """The toy's base, its codec and settings, and a dozen of its test questions."""
    args = latro.parse(["--out", str(tmp_path / "out")])
    device = distributed.init_distributed()
    codec, most = data.load_codec(args)
    examples = data.encode(codec, most, data.read_rows(args, "test")[:12], args)
    yield latro.load_model(args, device, torch.float32, latro.logprobs), codec, examples, args
    dist.destroy_process_group()


def test_one_evaluation_gives_every_limit(toy):
    """Greedy replies at every limit 1..48, made anew: what `lengths` says of them from the last."""
    policy, codec, examples, args = toy
    longest = max(len(e.answer) for e in examples) + len(codec.template_after_z)

    def at(limit):
        own = dataclasses.replace(args, L=limit)
        groups = latro.rollout(policy, codec, examples, [*range(12)], 0, own, 1, longest,
                               greedy=True)
        return [dict(ids=r.ids, actions=len(r.actions), cut=r.truncated,
                     right=strict(codec.text(r.ids), e.gold))
                for e, [r] in zip(examples, groups)]

    whole = at(args.L)
    assert {row["right"] for row in whole} == {True, False} and not any(r["cut"] for r in whole)
    assert all(len(row["ids"]) <= row["actions"] + longest for row in whole)
    curve = grading.lengths(whole, args.L)["mean"]
    for limit in range(1, args.L + 1):
        made = at(limit)
        for row, last in zip(made, whole):
            fits = last["actions"] <= limit
            assert row["cut"] == (not fits)
            assert row["ids"] == (last["ids"] if fits else last["ids"][:limit])
            assert row["right"] == (last["right"] and fits)
        assert curve[limit - 1] == fmean(row["right"] for row in made)


@pytest.mark.parametrize("limit", (16, 24))
def test_curve_is_that_of_an_evaluation(toy, limit):
    """Means and intervals, to the last bit."""
    policy, codec, examples, args = toy
    long, short = (latro.evaluate(policy, None, codec, examples, dataclasses.replace(args, L=L))
                   for L in (args.L, limit))
    curve = grading.lengths(long, args.L)
    assert {k: v[:limit] for k, v in curve.items()} == grading.lengths(short, limit)


def made_up(draw, given):
    """A question's record; K = 4 samples."""
    said = [draw.choice(["18.", "5", "", "7"]) for _ in range(4)]
    worth = lambda: dict(template=-draw.random(), answer=-draw.random(), end=-draw.random())
    known = {name: worth() for name in (("direct", "given", "other") if given else ("direct",))}
    return dict(gold="18", right=draw.random() < 0.5, actions=draw.randint(1, 12), **known,
                samples=[s | worth() for s in voter(said)["samples"]])


@pytest.fixture(params=[True, False], ids=["gold rationales", "none"])
def numbers(request, tmp_path):
    """Those of three made-up rows; the checkpoint has logs, without a KL, or none."""
    draw, run = random.Random(1), tmp_path / "run"
    run.mkdir()
    if request.param:
        Path(run, "latro.json").write_text(json.dumps(
            dict(base="m", args=dict(L=10, questions=8))))
        held_out = dict(elbo=None, kl=None, logp_y=-2.0, greedy=0.5, sampled=0.4, z_len=9.0)
        for name, keys in (("evals", held_out), ("metrics", ("elbo", "kl", "logp_y", "z_len"))):
            rows = [dict(step=i, **{k: held_out[k] for k in keys}) for i in (1, 2, 3)]
            Path(run, f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    rows = {n: [made_up(draw, request.param) for _ in range(9)] for n in ("base", "sft", "run")}
    args = latro.Args(task="toy", L=12, out=str(tmp_path))
    return json.loads(json.dumps(grading.figure_numbers(rows, [str(run)], args)))


def test_pictures(numbers, tmp_path):
    """Each is 1050 pixels wide, white at its corners, and shows every row in its colour."""
    from harness import figures
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    figures.draw(numbers, tmp_path)
    logs = numbers["curves"] is not None
    assert sorted(p.stem for p in tmp_path.glob("*.png")) == [*NAMES][not logs:]
    for name in [*NAMES][not logs:]:
        pixels = imread(tmp_path / f"{name}.png")[..., :3]
        assert pixels.shape[1] == 1050 and (pixels[[0, 0, -1, -1], [0, -1, 0, -1]] == 1).all()
        for color in figures.COLORS[:2 if name == "curves" else 3]:
            assert (np.abs(pixels - to_rgb(color)).max(-1) < 0.02).sum() > 100, (name, color)


def test_numbers(numbers):
    """What was seen before an update, what a bar is made of, where a policy was trained."""
    bars = numbers["likelihood"]["base"]
    if numbers["curves"] is None:
        assert [*bars] == ["direct", "sampled"] and numbers["length"]["trained"] == {}
    else:
        assert [*bars] == [*grading.CONTEXTS] and numbers["length"]["trained"] == dict(run=10)
        assert numbers["curves"]["held_out"]["seen"] == [8, 16, 24]
        assert numbers["curves"]["updates"]["seen"] == [0, 8, 16]
    for bar in bars.values():
        mean, low, high = bar["total"]
        assert mean == pytest.approx(bar["template"] + bar["answer"]) and low < mean < high


def test_without_matplotlib(monkeypatch, capsys):
    """Before anything is loaded: one sentence names the package."""
    import harness
    for name in [m for m in sys.modules if m.startswith(("matplotlib", "harness.figures"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(harness, "figures", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert grading.main(["--ckpt", "nowhere", "--figures"]) == 1
    said = capsys.readouterr().err
    assert said == ("eval.py: --figures needs the package matplotlib, which is not installed here:"
                    " pip install matplotlib\n")


def test_whole(tmp_path):
    """A run, its evaluation and its figures: these end where the table stands."""
    run = start(*TINY, "--steps", 1, out=tmp_path / "run")
    flags = ["--ckpt", str(run), "--k", "3", "--data", HELD.name, "--questions", "3"]
    assert grading.main(flags) == 0 and not [*run.glob("eval/*.png")]
    assert grading.main([*flags, "--figures"]) == 0
    assert sorted(p.stem for p in run.glob("eval/*.png")) == [*NAMES]
    drawn, held = (json.loads(Path(run, "eval", name).read_text())
                   for name in ("figures.json", "eval.json"))
    for name, row in held["results"].items():
        maj, each = (drawn["votes"][name][key]["mean"] for key in ("maj", "pass"))
        ends = {"T = 1": maj[0], "maj@k": maj[-1], "pass@k": each[-1],
                "greedy": drawn["length"]["rows"][name]["mean"][-1]}
        assert ends == {column: row["columns"][column][0] for column in ends}
        assert [*drawn["likelihood"][name]] == [*grading.CONTEXTS]
        assert all(isinstance(r["gold"], str) for r in held["rows"][name])
