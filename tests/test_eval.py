"""Proves that eval.py's replies do not depend on how the work is split or interrupted, and that its
statistics are correct."""

import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

import eval as grading
import latro
from harness import errors, report, statistics
from conftest import HELD, ROOT, TINY, TOY, launch, start, write_rows
from test_distributed import assert_close


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two updates from the toy's base."""
    return start(*TINY, "--steps", 2, out=tmp_path_factory.mktemp("eval") / "run")


def grade(run, out, *flags):
    """Runs eval.py in this process on 8 questions, 3 samples each. Returns its eval.json."""
    flags = "--ckpt", run, "--out", out, "--k", 3, *flags
    assert grading.main([*map(str, flags)]) == 0
    return json.loads(Path(out, "eval.json").read_text())


@pytest.fixture(scope="module")
def graded(run, tmp_path_factory):
    return grade(run, tmp_path_factory.mktemp("graded"))


def test_rows_and_records(graded, run):
    """Each row of the table has a record for every question, with k samples and log-probs."""
    assert list(graded["rows"]) == list(graded["results"]) == ["base", run.name]
    for records in graded["rows"].values():
        assert len(records) == 8 and all(len(r["samples"]) == 3 for r in records)
    asked = [[r["question"] for r in records] for records in graded["rows"].values()]
    assert asked[0] == asked[1]
    for r in graded["rows"]["base"]:  # the base is its own reference
        assert all(s["logp_z"] == s["logp0_z"] for s in r["samples"])
    assert any(s["logp_z"] != s["logp0_z"] for r in graded["rows"][run.name] for s in r["samples"])


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_batches_change_nothing(graded, run, tmp_path, batch):
    assert grade(run, tmp_path, "--batch", batch)["rows"] == graded["rows"]


@pytest.mark.slow
def test_processes_change_nothing(graded, run, tmp_path):
    """Floats agree to 1e-4: different matrix shapes round differently."""
    code, _, err = launch("--ckpt", run, "--out", tmp_path, "--k", 3, processes=2,
                          script=ROOT / "eval.py")
    assert code == 0, err
    result = json.loads(Path(tmp_path, "eval.json").read_text())
    assert_close(result["rows"], graded["rows"], rel=1e-4)
    assert_close(result["results"], graded["results"], rel=1e-4)


def test_continues_after_an_interruption(graded, run, tmp_path, monkeypatch, capsys):
    """No question is lost or graded twice, even if a kill left a partial line."""
    evaluate, finished, asked = latro.evaluate, [], []

    def interrupted(*args):
        if len(finished) == 2:
            raise OSError("pulled the plug")
        finished.append(args[-1])
        return evaluate(*args)

    def recorded(*args):
        asked.append(args[-1])
        return evaluate(*args)
    flags = ["--ckpt", str(run), "--out", str(tmp_path), "--k", "3", "--batch", "3"]
    with monkeypatch.context() as patch:
        patch.setattr(latro, "evaluate", interrupted)
        assert grading.main(flags) == 1
    assert "run this again" in capsys.readouterr().err
    with open(tmp_path / "base.jsonl", "a") as f:
        f.write('{"question": "torn')
    monkeypatch.setattr(latro, "evaluate", recorded)
    assert grading.main(flags) == 0
    assert asked[0] == slice(6, 9) and len(asked) == 4  # the rest of the base; all of the run
    assert json.loads(Path(tmp_path, "eval.json").read_text())["rows"] == graded["rows"]
    asked.clear()
    assert grading.main(flags) == 0 and not asked


@pytest.mark.parametrize("flags", [
    ["--k", 2], ["--seed", 1], ["--L", 20], ["--split", "validation"]])
def test_other_settings_start_over(graded, run, tmp_path, flags):
    for name in ("base", run.name):
        lines = [json.dumps(r) for r in graded["rows"][name]]
        Path(tmp_path, f"{name}.jsonl").write_text("\n".join(["{}", *lines, ""]))
    again = grade(run, tmp_path, *flags)
    assert again["rows"] != graded["rows"]


def test_changed_weights_start_over(graded, run, tmp_path):
    """Records made with earlier weights are not reused."""
    grade(run, tmp_path)
    weights = run / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    before = (tmp_path / f"{run.name}.jsonl").stat().st_ino
    grade(run, tmp_path)
    assert (tmp_path / f"{run.name}.jsonl").stat().st_ino != before


def test_a_corrected_answer_is_graded_again(run, tmp_path):
    """No verdict, ELBO or bound of the old answer comes back."""
    folder = shutil.copytree(HELD.name, tmp_path / "data")
    flags = "--data", folder, "--questions", 2
    before = grade(run, tmp_path / "eval", *flags)
    first, *others = (folder / "test.jsonl").read_text().splitlines()
    right = before["rows"]["base"][0]["said"].strip(" .")
    corrected = json.dumps(json.loads(first) | dict(answer=right))
    (folder / "test.jsonl").write_text("\n".join([corrected, *others]))
    after = grade(run, tmp_path / "eval", *flags)
    for name, rows in after["rows"].items():
        old = before["rows"][name][0]
        assert rows[0]["gold"] == right != old["gold"]
        assert rows[0]["direct"] != old["direct"] and rows[1] == before["rows"][name][1]
    assert after["rows"]["base"][0]["right"] and not before["rows"]["base"][0]["right"]


def test_another_base_is_another_reference(graded, run, tmp_path):
    grade(run, tmp_path)
    [own, *_] = grade(run, tmp_path, "--base", run)["rows"][run.name]
    for sample, before in zip(own["samples"], graded["rows"][run.name][0]["samples"], strict=True):
        assert sample["logp0_z"] == pytest.approx(sample["logp_z"], abs=1e-4)  # pi_0 is the run
        assert abs(before["logp0_z"] - before["logp_z"]) > 1e-3


def test_temperature_is_1_whatever_the_run_was_trained_at(run, tmp_path):
    """Accuracy of a sample at the run's --temperature would not compare with other runs."""
    folder = shutil.copytree(run, tmp_path / "warm")
    note = json.loads((folder / "latro.json").read_text())
    note["args"]["temperature"] = 0.3
    (folder / "latro.json").write_text(json.dumps(note))
    assert grading.settings(grading.parse(["--ckpt", str(folder)])).temperature == 1.0
    cold = grade(run, tmp_path / "eval", "--temperature", 0.3, "--questions", 2)
    assert "T = 0.3" in (tmp_path / "eval" / "eval.md").read_text()
    again = grade(run, tmp_path / "eval", "--questions", 2)  # nothing of it is reused
    assert "T = 1" in (tmp_path / "eval" / "eval.md").read_text()
    assert [r["samples"] for r in again["rows"]["base"]] != [
        r["samples"] for r in cold["rows"]["base"]]


# ------------------------------------------------------- numbers

def sample(said, logp_y=-1.0, kl=0.0, right=False, z_len=3, finished=True, z="2 + 2 = 4."):
    return dict(said=said, right=right, logp_y=logp_y, logp_z=kl - 5, logp0_z=-5.0, z_len=z_len,
                finished=finished, eos=False, z=z, actions=z_len + 3, reward=logp_y,
                reaches="4" in z, answers=2, template=-0.5, answer=logp_y + 0.1, end=-0.1)


def record(said, samples, gold="4", text="", right=False):
    return dict(question="?", gold=gold, options=[], said=said,
                text=text or f"The answer is {said}.", right=right,
                direct=dict(template=-9.0, answer=-2.0, end=-0.5), samples=samples)


def test_columns():
    r = record("5", [sample("4", -1.0, 2.0, True, 3), sample("7", -3.0, 0.0, False, 5, False),
                     sample("4.0", -2.0, 1.0, True, 4, z="so 3")], text="It is 5, so 4")
    r["samples"][0]["answers"] = 3  # tokens of y
    r["given"] = dict(template=-0.1, answer=-0.5, end=-0.25)
    found = grading.columns(r)
    assert [*found] == [name for names in report.TABLES for name in names]
    assert found == pytest.approx({
        "greedy": 0, "loose": 1, "sampled": 2 / 3, "maj@k": 1, "pass@k": 1, "log p(y|x)": -2.5,
        "log p(y|x+gold)": -0.75, "log p(y|x+other)": None, "log p(y|x+z)": -2,
        "log mean p(y|x+z)": math.log((math.exp(-1) + math.exp(-3) + math.exp(-2)) / 3),
        "per token": -(1 + 3 + 2) / (3 + 2 + 2), "ELBO": -3,
        "bound": math.log((math.exp(-3) + math.exp(-3) + math.exp(-3)) / 3),
        "z": 4, "ends": 2 / 3, "template": -0.5, "answer": -1.9, "end": -0.1,
        "reaches": 2 / 3, "follows": 1 / 3, "r ~ right": 3**0.5 / 2,
        "entropy": (3 + 5 + 4) / (6 + 8 + 7), "unique": 2 / 3})


def test_missing_values():
    """No correlation if all samples are right; no "follows" if no reply answers."""
    silent = record("4", [sample("", right=True), sample("", -2.0, right=True)])
    found = grading.columns(silent)
    assert found["r ~ right"] is None and found["follows"] is None
    known = record("4", [sample("4", -1.0, right=True), sample("4", -2.0, z="so 3")])
    rows = dict(base=[silent] * 3, run=[silent, known, known])
    base, run = (row["columns"] for row in grading.results(rows).values())
    assert base["follows"] == base["r ~ right"] == (None, None, None)
    assert run["follows"].mean == 0.5 and run["r ~ right"].mean == pytest.approx(1)
    assert "nan" not in report.markdown(grading.results(rows), 2)


def test_prompts_are_those_of_the_run(tmp_path, monkeypatch):
    """For every row of the table, also --shots, whose rows are not graded; another task has its
    own prompt."""
    made = write_rows(tmp_path / "data", n=8)
    rows = [row | dict(rationale=f"On Monday {i + 3} + 2 = {i + 5}.") for i, row in enumerate(made)]
    for split in ("train", "test"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "data" / f"{split}.jsonl").write_text(text)
    flags = f"--task qa --model {TOY} --data {tmp_path / 'data'} --steps 1 --L 24 --K 2".split()
    run = start(*flags, "--questions", 2, "--shots", 1, "--prompt", "Well {question}",
                out=tmp_path / "run")
    asked = []
    encode = grading.encode
    monkeypatch.setattr(grading, "encode",
                        lambda codec, *a: asked.append(codec) or encode(codec, *a))
    found = grade(run, tmp_path / "a", "--split", "train")
    assert [r["question"] for r in found["rows"]["base"]] == [row["question"] for row in rows[1:]]
    for _ in range(2):
        turns = asked[-1].turns("x")
        assert turns == [("user", "Well " + rows[0]["question"]),
                         ("assistant", f"{rows[0]['rationale']} The answer is 5."),
                         ("user", "Well x")]
        grade(run, tmp_path / "a", "--split", "train")
    grade(run, tmp_path / "b", "--task", "toy")
    assert asked[-1].turns("x")[-1] == ("user", "x")


def test_follows_ignores_spelling():
    """Compares numbers if gold is a number, else options."""
    said = [("4 apples.", "2 + 2 = 4."), ("$4.00", "2 + 2 = 4."), ("5", "2 + 2 = 4."), ("", "4"),
            ("no idea", "2 + 2 = 4.")]
    samples = [sample(answer, z=z) for answer, z in said]
    assert grading.follows(samples, [], "18") == 2 / 4
    samples = [sample("Copper.", z="It is not iron but copper."), sample("iron", z="So copper.")]
    assert grading.follows(samples, ["copper", "iron"], "iron") == 1 / 2


def test_nan_is_an_error():
    rows = dict(base=[record("4", [sample("4")] * 2)] * 3)
    rows["run"] = [*rows["base"][:2], record("4", [sample("4"), sample("4", logp_y=math.nan)])]
    message = r"run, question 3: log p\(y\|x\+z\) is not a number"
    with pytest.raises(errors.UserError, match=message):
        grading.results(rows)


def test_estimates():
    """A Bernoulli mean's interval is that of the binomial quantiles; a constant's has no width."""
    values = np.array([[1.0, 7.0]] * 30 + [[0.0, 7.0]] * 70)
    fraction, constant = statistics.estimates(values)
    assert constant == pytest.approx((7, 7, 7))
    assert fraction.mean == 0.3
    probability = [math.comb(100, i) * 0.3**i * 0.7**(100 - i) for i in range(101)]
    cdf = list(itertools.accumulate(probability))
    low, high = (next(i for i, c in enumerate(cdf) if c >= q) / 100 for q in (0.025, 0.975))
    assert abs(fraction.low - low) <= 0.01 and abs(fraction.high - high) <= 0.01


def test_mcnemar_by_enumeration():
    """p is the part of all 2^n outcomes of the changed questions that is at least as uneven."""
    for fixed, broken in itertools.product(range(6), repeat=2):
        n = fixed + broken
        before = [False] * fixed + [True] * broken + [True, False]
        after = [True] * fixed + [False] * broken + [True, False]
        seen = abs(fixed - broken)
        p = sum(abs(2 * sum(ways) - n) >= seen for ways in itertools.product((0, 1), repeat=n))
        assert statistics.mcnemar(before, after) == (fixed, broken, pytest.approx(p / 2**n))


def test_gains_are_paired():
    """A model better by the same amount on every question has a gain without width."""
    rows = {name: [record("4", [sample("4", logp_y=y + gain)] * 2) for y in (-1.0, -8.0, -3.0)]
            for name, gain in (("base", 0.0), ("run", 0.5))}
    found = grading.results(rows)
    assert found["run"]["gain"]["log p(y|x+z)"] == pytest.approx((0.5, 0.5, 0.5))
    low, high = found["run"]["columns"]["log p(y|x+z)"][1:]
    assert high - low > 1 and "gain" not in found["base"]


# ------------------------------------------------------- bad input

@pytest.mark.parametrize("flags, words", [
    ("--ckpt nowhere", ["nowhere"]), ("--ckpt {empty}", ["no model"]), ("", ["--ckpt"]),
    ("--ckpt {run} --k 1", ["--k: 1", "at least 2"]), ("--ckpt {run} --seed -1", ["--seed: -1"]),
    ("--ckpt {run} --batch 0", ["--batch: 0", "at least 1"]),
    ("--ckpt {run} --split dev", ["dev", "--split"]), ("--ckpt {run} --data {empty}", ["test"]),
    ("--ckpt {run} --sft nowhere", ["nowhere"]), ("--ckpt {toy}", ["--task", "--data", "--base"]),
    ("--ckpt {run} --base nowhere", ["nowhere"]), ("--ckpt {run} --L 5000", ["--L", "context"]),
    ("--ckpt {run} --task gsm8k", ["gsm8k"]), ("--ckpt {run} --k many", ["many"]),
    ("--ckpt {run} {run}", ["one name"]),
])  # fmt: skip
def test_bad_flags(flags, words, run, tmp_path, capsys):
    """Each gives one line on stderr that names what is wrong."""
    (tmp_path / "empty").mkdir()
    flags = flags.format(run=run, toy=TOY, empty=tmp_path / "empty").split()
    assert grading.main([*flags, "--out", str(tmp_path / "out")]) == 1
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("eval.py: ") and all(word in line for word in words)
