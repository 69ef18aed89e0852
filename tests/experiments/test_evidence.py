"""Proves that the experiments train and grade every arm, and continue where they stopped."""

import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TOY, rows, write_rows

import eval as grading
import latro
from experiments import controls, evidence, real_model
from harness import errors


@pytest.mark.parametrize("control", controls.CONTROLS)
def test_broken_credit(control):
    """The controls change the advantages and the weights of z, and nothing else."""
    generator, K = torch.Generator().manual_seed(0), 3
    edges = torch.arange(0, 26, 2)
    logp = -torch.rand(24, generator=generator)
    inputs = logp, logp - 0.1, edges[:-1:2], edges[1::2], edges[2::2], K, 0.05
    right = latro.score_rationales(*inputs, total=6.0)
    broken = controls.broken_credit(control)(*inputs, total=6.0)
    A = right.advantage.view(2, K)
    A = torch.zeros_like(A) if control == "zero" else A[:, [2, 0, 1]]
    assert torch.equal(broken.advantage, A.flatten()) and torch.equal(broken.reward, right.reward)
    spans = torch.arange(24) // 2
    z = spans % 2 == 0
    assert torch.equal(broken.token_weights[~z], right.token_weights[~z])
    assert torch.allclose(broken.token_weights[z], A.flatten()[spans[z] // 2] / 6)
    assert not torch.allclose(broken.token_weights[z], right.token_weights[z])


def test_a_control_needs_a_name(capsys):
    """One sentence says which there are, and nothing is trained."""
    assert controls.main(["--steps", "1"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture
def in_process(monkeypatch):
    """Runs in this process what the scripts start as processes: seconds instead of minutes. Returns
    the list of commands."""
    started, mains = [], dict(latro=latro.main, eval=grading.main, controls=controls.main)

    def run(command):
        started.append(command)
        first = next(i for i, part in enumerate(command) if str(part).endswith(".py"))
        script, *flags = map(str, command[first:])
        with monkeypatch.context() as patch:  # a control replaces it for the whole process
            patch.setattr(latro, "score_rationales", latro.score_rationales)
            assert mains[Path(script).stem](flags) == 0

    def run_all(commands, jobs):
        for command in commands:
            run(command)
    monkeypatch.setattr(evidence, "run_all", run_all)
    monkeypatch.setattr(real_model, "subprocess", SimpleNamespace(
        run=lambda command: SimpleNamespace(returncode=run(command))))
    return started


@pytest.mark.slow
def test_evidence(in_process, tmp_path, monkeypatch):
    """It writes tables, figures and the record. A second call trains and grades nothing."""
    small = "--questions 2 --K 3 --L 24 --steps 1 --eval-questions 1"
    monkeypatch.setitem(evidence.LEVELS, "default", evidence.LEVELS["default"]._replace(
        arms={"LaTRO": evidence.Arm(2, small), "no credit": evidence.Arm(1, small, "zero"),
              "SFT": evidence.Arm(1, f"{small} --objective sft"),
              "another base": evidence.Arm(1, small, base=evidence.SECOND)},
        figures=dict(k=2, questions=3, ckpt=["LaTRO"], sft="SFT")))
    out = tmp_path / "made"
    out.mkdir()
    flags = ("evidence.py", "--questions", "3", "--runs", tmp_path / "runs", "--out", out,
             "--pictures", out, "--arms", "LaTRO", "no credit", "SFT")
    monkeypatch.setattr(sys, "argv", [*map(str, flags)])
    evidence.main()
    made = sorted(file.name for file in out.iterdir())
    assert made == ["curves.png", "diagnostics.md", "evidence.json", "evidence.md", "length.png",
                    "likelihood.png", "votes.png"]
    heads, _, base, mean, broken, sft = (out / "evidence.md").read_text().splitlines()
    assert heads.startswith("|  | seeds | greedy | T = 1 | maj@8 | log p(y\\|x)")
    assert base.startswith("| base | 1 | 0.") and mean.startswith("| LaTRO | 2 | 0.")
    assert broken.startswith("| no credit | 1 | ") and sft.startswith("| SFT | 1 | ")
    [graded] = json.loads((out / "evidence.json").read_text())
    assert "rows" not in graded and graded["results"]["LaTRO.1"]["columns"]["greedy"]
    started = len(in_process)
    evidence.main()
    assert len(in_process) == started + 2  # the two evaluations, which already have all replies


@pytest.mark.slow
def test_evidence_of_the_hard_level(in_process, tmp_path, monkeypatch):
    """Its own arms, on its own questions; tables of what the runs logged, and the figure."""
    small = "--questions 2 --K 3 --L 24 --steps 2 --eval-questions 1 --eval-every 1"
    arms = {name: evidence.HARD_ARMS[name]._replace(seeds=seeds, flags=small)
            for name, seeds in (("LaTRO", 2), ("A = 0", 1))}
    monkeypatch.setitem(evidence.LEVELS, "hard", evidence.LEVELS["hard"]._replace(
        arms=arms, learning=("LaTRO", "A = 0")))
    flags = ("evidence.py", "--level", "hard", "--questions", "3", "--runs", tmp_path / "runs",
             "--out", tmp_path, "--pictures", tmp_path)
    monkeypatch.setattr(sys, "argv", [*map(str, flags)])
    evidence.main()
    made = sorted(file.name for file in tmp_path.iterdir() if file.is_file())
    assert made == ["hard.json", "hard.md", "hard.png", "hard_diagnostics.md", "hard_learning.md"]
    for name in ("LaTRO.1", "A_=_0.0"):
        saved = json.loads((tmp_path / "runs" / name / "latro.json").read_text())
        assert saved["args"]["data"] == str(ROOT / "toy/hard")
        assert saved["base"] == str(ROOT / "toy/hard/model")
    [graded] = json.loads((tmp_path / "hard.json").read_text())
    log = graded["results"]["LaTRO.1"]["logged"]
    assert log["step"] == [0, 1, 2] and len(log["greedy"]) == len(log["sampled"]) == 3
    assert log["seconds"] > 0 and "rows" not in graded
    learned = (tmp_path / "hard_learning.md").read_text().splitlines()
    assert learned[2] == "| base | 1 | - | - | - | - | - |"


def result(logged=None, **columns):
    """What is known of a run, with these values of columns."""
    found = dict(columns={name: [value, None, None] for name, value in columns.items()})
    return found | (dict(logged=logged) if logged else {})


def test_means_of_a_run():
    """eval.py's columns, the perplexity of y, and accuracies by update from what was logged."""
    known = {"greedy": 0.5, "per token": -2.0}
    assert evidence.means(result(**known)) == pytest.approx(known | {"perplexity": math.e**2})
    log = dict(step=[0, 5, 10], greedy=[0.1, 0.2, 0.3], sampled=[0.4, 0.5, 0.6], seconds=70.0)
    found = evidence.means(result(log, **known))
    assert found["greedy, 10"] == 0.3 and found["T = 1, 5"] == 0.5 and found["seconds"] == 70


def test_logged(tmp_path):
    """Seconds of all phases of all updates, accuracies of all evaluations."""
    evals = [dict(step=step, greedy=step / 10, sampled=step / 20) for step in (0, 5)]
    seconds = [dict(sample=1.0, score=2.0), dict(sample=0.5, score=0.25)]
    for name, found in (("evals", evals), ("metrics", [dict(seconds=s) for s in seconds])):
        text = "".join(json.dumps(row) + "\n" for row in found)
        (tmp_path / f"{name}.jsonl").write_text(text)
    assert evidence.logged(tmp_path) == dict(seconds=3.75, step=[0, 5], greedy=[0, 0.5],
                                             sampled=[0, 0.25])


def test_table_row():
    """A range over seeds, one number where its ends look the same, "-" where a run has no value."""
    log = dict(step=[10], greedy=[0.25], sampled=[0.125], seconds=99.6)
    seeds = [result(log, greedy=0.5, **{"per token": 0.0}),
             result(log, greedy=0.75, **{"per token": -1.0})]
    columns = "greedy", "perplexity", "greedy, 10", "seconds"
    assert evidence.table_row("LaTRO", columns, seeds) == (
        "| LaTRO | 2 | 0.500 to 0.750 | 1.00 to 2.72 | 0.250 | 100 |\n")
    assert evidence.table_row("base", columns, [result(greedy=0.5, **{"per token": -1.0})]) == (
        "| base | 1 | 0.500 | 2.72 | - | - |\n")


def test_no_two_runs_share_a_directory():
    """The arm "answer weight 0", seed 1, is not "answer weight 0.1"."""
    for level in evidence.LEVELS.values():
        folders = [evidence.run_dir(Path("runs"), name, seed) for name, arm in level.arms.items()
                   for seed in range(arm.seeds)]
        assert len({*folders}) == len(folders)
        drawn = {*level.learning, *level.figures.get("ckpt", [])}
        assert drawn <= {*level.arms}


@pytest.mark.parametrize("level", evidence.LEVELS)
def test_every_arm_is_a_command(level):
    """latro.py accepts its flags. The arms of the hard level differ from LaTRO in what they
    name."""
    for name, arm in evidence.LEVELS[level].arms.items():
        words = [*map(str, evidence.command(arm, 1, Path("nowhere")))]
        args = latro.parse(words[2 + bool(arm.control):])
        assert (args.seed, args.task, args.model) == (1, "toy", str(arm.base))
        if level == "hard":
            assert (args.steps, args.questions, args.eval_every) == (50, 8, 5)


def test_an_unknown_arm(monkeypatch, capsys):
    """One sentence names those of the level."""
    monkeypatch.setattr(sys, "argv", ["evidence.py", "--level", "hard", "--arms", "L 28"])
    with pytest.raises(SystemExit):
        evidence.main()
    assert "L 28: choose from LaTRO, SFT, iwae bound" in capsys.readouterr().err


def test_missing_base(monkeypatch, tmp_path):
    """It is reported before anything is trained."""
    monkeypatch.setitem(evidence.ARMS, "LaTRO", evidence.Arm(1, base=tmp_path))
    monkeypatch.setattr(evidence, "run_all", None)
    monkeypatch.setattr(sys, "argv", ["evidence.py", "--arms", "LaTRO"])
    with pytest.raises(SystemExit, match=f"LaTRO: no model in {tmp_path}"):
        evidence.main()


def gsm8k(folder):
    """The toy's questions in the layout of GSM8K."""
    for split in ("train", "test"):
        made = write_rows(folder, split, 16)
        text = [json.dumps(r | dict(answer=f"Monday 1 + 2 = 3.\n#### {r['answer']}")) for r in made]
        (folder / f"{split}.jsonl").write_text("\n".join(text) + "\n")
    return folder


def real_model_flags(tmp_path, *flags):
    """A command line for the toy; `flags` precede those of every run."""
    return [*map(str, ["real_model.py", "--model", TOY, "--data", gsm8k(tmp_path / "data"),
                       "--runs", tmp_path / "runs", "--out", tmp_path / "kept", "--k", 2,
                       "--batch", 2, *flags, "--", "--K", 2, "--L", 16, "--eval-questions", 2,
                       "--lr", 0.05])]


@pytest.mark.slow
def test_real_model(in_process, tmp_path, monkeypatch, capsys):
    """It trains and grades every arm, and makes the table from what it keeps. A second call, on a
    machine without the runs, does only what is missing."""
    runs, kept = tmp_path / "runs", tmp_path / "kept"
    monkeypatch.setattr(sys, "argv", real_model_flags(tmp_path, "--updates", 2, "--graded", 3))
    real_model.main()
    text = (kept / "table.md").read_text()
    names = [line.split(" | ")[0].strip("| ") for line in text.splitlines()]
    assert text in capsys.readouterr().out
    assert names[2:6] == ["base", "latro", "sft", "shuffled"]
    assert text.count("McNemar") == 3 and (kept / "learning.png").stat().st_size > 10_000
    first, second = (rows(runs / name, "samples")[1] for name in ("latro", "shuffled"))
    assert first["samples"][0]["z"] == second["samples"][0]["z"]  # the same model, before update 1
    arms = {name: json.loads((kept / f"{name}.json").read_text()) for name in real_model.ARMS}
    assert [row["step"] for row in arms["latro"]["log"]] == [1, 2]
    shutil.rmtree(runs)
    monkeypatch.setattr(sys, "argv", real_model_flags(tmp_path, "--updates", 2, "--graded", 5))
    real_model.main()
    assert len(in_process) == 3
    for name, before in arms.items():
        after = json.loads((kept / f"{name}.json").read_text())
        assert after["questions"][:3] == before["questions"] and len(after["questions"]) == 5
        assert [one["first"] for one in after["grading"]] == [0, 3]


def test_what_is_graded_is_what_eval_grades(in_process, tmp_path, monkeypatch):
    """The columns of an arm are those of eval.py for the merged model of the run."""
    run, flags = tmp_path / "runs" / "latro", ("--updates", 1, "--graded", 3, "--arms", "latro")
    monkeypatch.setattr(sys, "argv", real_model_flags(tmp_path, *flags))
    real_model.main()
    kept = json.loads((tmp_path / "kept/latro.json").read_text())["questions"]
    assert grading.main(["--ckpt", str(run), "--k", "2", "--questions", "3"]) == 0
    graded = json.loads((run / "eval/eval.json").read_text())["rows"]["latro"]
    for row, record in zip(kept, graded, strict=True):
        theirs = grading.columns(record)
        for name, value in row.items():
            if value is not None:
                assert value == pytest.approx(theirs[name], rel=1e-4, abs=1e-4), name
    assert abs(kept[0]["ELBO"] - kept[0]["log p(y|x+z)"]) > 0.1  # a KL: the adapters are on


def test_an_arm_that_fails_says_how_to_go_on(monkeypatch, tmp_path):
    monkeypatch.setattr(real_model, "subprocess",
                        SimpleNamespace(run=lambda command: SimpleNamespace(returncode=1)))
    monkeypatch.setattr(sys, "argv", real_model_flags(tmp_path, "--arms", "latro"))
    with pytest.raises(errors.UserError, match="latro: not trained.*run the same command again"):
        real_model.main()


def test_another_number_of_samples_is_refused(monkeypatch, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/latro.json").write_text(json.dumps(dict(k=4, grading=[], questions=[])))
    monkeypatch.setattr(sys, "argv", real_model_flags(tmp_path, "--arms", "latro"))
    with pytest.raises(errors.UserError, match="--k 2: .*has 4 samples"):
        real_model.main()
