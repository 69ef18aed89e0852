"""Proves that the numbers in the figures follow their definitions and that no picture is blank."""

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
def test_pass_at_k(right):
    """Equals the fraction of all subsets of k samples that contain a right one."""
    samples = [i < right for i in range(5)]
    for k, estimate in enumerate(statistics.pass_at_k(samples), 1):
        subsets = [*combinations(samples, k)]
        assert estimate == pytest.approx(fmean(map(any, subsets)), abs=1e-12)
        assert len(subsets) == comb(5, k)


def question_record(said, gold="18"):
    """A question's record whose samples give these answers."""
    return dict(gold=gold, samples=[dict(said=s, right=same_answer(s, gold)) for s in said])


@pytest.mark.parametrize("said", [
    ["18.", "5", "5", "18"], ["5", "18", "18.0", "5.0"], ["", "", "18", "7"], ["", "", "", ""],
    ["7", "18", "", "9"], ["18", "18", "18", "18"], ["3", "4", "5", "18"]])
def test_majority_curve(said):
    """Each value is the accuracy of answers.majority on runs of k samples of the ring. For every
    order, k = 1 gives the accuracy of a sample and k = K the table's maj@k; the first of a tie
    wins."""
    row, K = question_record(said), len(said)

    def wins(subset):
        return same_answer(majority([said[i] for i in subset], "18"), "18")
    for seed in range(8):
        order = np.random.default_rng(seed).permutation(K)
        curve = grading.majorities(row, order.tolist())
        for k, accuracy in enumerate(curve, 1):
            subsets = [sorted(order[(i + j) % K] for j in range(k)) for i in range(K)]
            assert accuracy == fmean(map(wins, subsets))
        assert curve[0] == fmean(s["right"] for s in row["samples"])
        assert curve[-1] == wins(range(K))


def test_majority_curve_is_unbiased():
    """Averaged over orders of the ring, maj@k is the mean over all subsets of k samples."""
    rng, said = random.Random(0), ["18", "5", "18.", "", "7", "5"]
    orders = [rng.sample(range(6), 6) for _ in range(3000)]
    row = question_record(said)
    means = np.mean([grading.majorities(row, order) for order in orders], axis=0)
    for k in range(1, 7):
        verdicts = [same_answer(majority([*subset], "18"), "18")
                    for subset in combinations(said, k)]
        assert means[k - 1] == pytest.approx(fmean(verdicts), abs=0.02)


@pytest.fixture
def toy(tmp_path):
    """The toy's base model, its codec, 12 test questions, and the settings."""
    args = latro.parse(["--out", str(tmp_path / "out")])
    device = distributed.init_distributed()
    codec, _ = data.load_codec_and_train_rows(args)
    examples = data.encode(codec, data.read_rows(args, "test")[:12], args)
    yield latro.load_model(args, device, torch.float32, latro.logprobs), codec, examples, args
    dist.destroy_process_group()


def test_one_evaluation_gives_every_limit(toy):
    """`lengths` predicts the accuracy at every limit 1..48 from one evaluation at 48."""
    policy, codec, examples, args = toy
    longest = max(len(e.answer) for e in examples) + len(codec.template_after_z)

    def replies_at(limit):
        limited = dataclasses.replace(args, L=limit)
        groups = latro.rollout(policy, codec, examples, [*range(12)], 0, limited, 0, longest,
                               greedy=True)
        return [dict(ids=reply.ids, actions=len(reply.actions), truncated=reply.truncated,
                     right=strict(codec.text(reply.ids), example.gold))
                for example, [reply] in zip(examples, groups)]

    whole = replies_at(args.L)
    assert {row["right"] for row in whole} == {True, False}
    assert not any(row["truncated"] for row in whole)
    assert all(len(row["ids"]) <= row["actions"] + longest for row in whole)
    curve = grading.lengths(whole, args.L)["mean"]
    for limit in range(1, args.L + 1):
        replies = replies_at(limit)
        for row, last in zip(replies, whole, strict=True):
            fits = last["actions"] <= limit
            assert row["truncated"] == (not fits)
            assert row["ids"] == (last["ids"] if fits else last["ids"][:limit])
            assert row["right"] == (last["right"] and fits)
        assert curve[limit - 1] == fmean(row["right"] for row in replies)


@pytest.mark.parametrize("limit", (16, 24))
def test_length_curve_equals_an_evaluation_at_the_limit(toy, limit):
    """Means and intervals are bit-equal."""
    policy, codec, examples, args = toy
    long, short = (latro.evaluate(policy, None, codec, examples, dataclasses.replace(args, L=L))
                   for L in (args.L, limit))
    curve = grading.lengths(long, args.L)
    assert {k: v[:limit] for k, v in curve.items()} == grading.lengths(short, limit)


def random_record(rng, gold_rationales):
    """A question's record with K = 4 samples."""
    def logprobs():
        return dict(template=-rng.random(), answer=-rng.random(), end=-rng.random())
    said = [rng.choice(["18.", "5", "", "7"]) for _ in range(4)]
    contexts = ("direct", "given", "other") if gold_rationales else ("direct",)
    known = {name: logprobs() for name in contexts}
    return dict(gold="18", right=rng.random() < 0.5, actions=rng.randint(1, 12), **known,
                samples=[s | logprobs() for s in question_record(said)["samples"]])


@pytest.fixture(params=[True, False], ids=["gold rationales", "none"])
def numbers(request, tmp_path):
    """Figure numbers of three random rows. With gold rationales the run has logs, without KL."""
    rng, run = random.Random(1), tmp_path / "run"
    run.mkdir()
    if request.param:
        Path(run, "latro.json").write_text(json.dumps(
            dict(base="m", args=dict(L=10, questions=8))))
        held_out = dict(elbo=None, kl=None, logp_y=-2.0, greedy=0.5, sampled=0.4, z_len=9.0)
        for name, keys in (("evals", held_out), ("metrics", ("elbo", "kl", "logp_y", "z_len"))):
            log = [dict(step=i, **{k: held_out[k] for k in keys}) for i in (1, 2, 3)]
            Path(run, f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log))
    rows = {name: [random_record(rng, request.param) for _ in range(9)]
            for name in ("base", "sft", "run")}
    args = latro.Args(task="toy", L=12, out=str(tmp_path))
    return json.loads(json.dumps(grading.figure_numbers(rows, [str(run)], args)))


def test_pictures(numbers, tmp_path):
    """Each is 1050 pixels wide, has white corners, and shows every row in its colour."""
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


def test_picture_of_learning(tmp_path):
    """As the others. Both panels draw the mean over an arm's runs, and the range."""
    from harness import figures
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    runs = {name: [dict(step=[0, 5], greedy=[0.1, 0.5 + gain], sampled=[0.1, gain])
                   for gain in (low, low + 0.2)] for name, low in (("LaTRO", 0.2), ("K 4", 0.0))}
    for axis, ends in zip(figures.learning(runs).axes, ([0.8, 0.6], [0.3, 0.1])):
        drawn = [line.get_ydata().tolist() for line in axis.lines]
        assert drawn == [pytest.approx([0.1, end]) for end in ends]
    figures.draw_learning(runs, tmp_path / "hard.png")
    pixels = imread(tmp_path / "hard.png")[..., :3]
    assert pixels.shape[1] == 1050 and (pixels[[0, 0, -1, -1], [0, -1, 0, -1]] == 1).all()
    for color in figures.COLORS[:2]:
        assert (np.abs(pixels - to_rgb(color)).max(-1) < 0.02).sum() > 100


def test_figure_numbers(numbers):
    """Questions seen, the parts of a bar, and the L of training."""
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
    """One sentence names the missing package, before anything is loaded."""
    import harness
    for name in [m for m in sys.modules if m.startswith(("matplotlib", "harness.figures"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(harness, "figures", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert grading.main(["--ckpt", "nowhere", "--figures"]) == 1
    err = capsys.readouterr().err
    assert err == ("eval.py: --figures needs the package matplotlib, which is not installed here:"
                    " pip install matplotlib\n")


def test_figures_agree_with_the_table(tmp_path):
    """The last value of each curve of a real run is the value in the table."""
    run = start(*TINY, "--steps", 1, out=tmp_path / "run")
    flags = ["--ckpt", str(run), "--k", "3", "--data", HELD.name, "--questions", "3"]
    assert grading.main(flags) == 0 and not [*run.glob("eval/*.png")]
    assert grading.main([*flags, "--figures"]) == 0
    assert sorted(p.stem for p in run.glob("eval/*.png")) == [*NAMES]
    drawn, graded = (json.loads(Path(run, "eval", name).read_text())
                   for name in ("figures.json", "eval.json"))
    for name, row in graded["results"].items():
        maj, passed = (drawn["votes"][name][key]["mean"] for key in ("maj", "pass"))
        ends = {"sampled": maj[0], "maj@k": maj[-1], "pass@k": passed[-1],
                "greedy": drawn["length"]["rows"][name]["mean"][-1]}
        assert ends == {column: row["columns"][column][0] for column in ends}
        assert [*drawn["likelihood"][name]] == [*grading.CONTEXTS]
        assert all(isinstance(r["gold"], str) for r in graded["rows"][name])
