"""Proves that the experiments train and grade every arm, and continue where they stopped."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TOY, rows, write_rows

import eval as grading
import latro
from experiments import controls, evidence, real_model


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
    monkeypatch.setattr(real_model, "run_until", lambda deadline, command: run(command))
    return started


@pytest.mark.slow
def test_evidence(in_process, tmp_path, monkeypatch):
    """It writes tables, figures and the record. A second call trains and grades nothing."""
    small = "--questions 2 --K 3 --L 24 --steps 1 --eval-questions 1"
    monkeypatch.setattr(evidence, "ARMS", {
        "LaTRO": evidence.Arm(2, small), "no credit": evidence.Arm(1, small, "zero"),
        "SFT": evidence.Arm(1, f"{small} --objective sft"),
        "another base": evidence.Arm(1, small, base=evidence.SECOND)})
    monkeypatch.setattr(evidence, "FIGURES", dict(k=2, questions=3, ckpt=["LaTRO"], sft="SFT"))
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


@pytest.mark.slow
def test_real_model(in_process, tmp_path, monkeypatch, capsys):
    """It trains every arm from the warm-up, and writes the table. A second call does nothing."""
    runs = tmp_path / "runs"
    flags = ("--model", TOY, "--data", gsm8k(tmp_path / "data"), "--runs", runs,
             *"--updates 2 --warm-up 1 --every 1 --graded 3 --k 2 --batch 2 --held-out 2".split(),
             *"-- --questions 2 --K 2 --L 16".split())
    monkeypatch.setattr(sys, "argv", ["real_model.py", *map(str, flags)])
    real_model.main()
    text = (runs / "graded/eval.md").read_text()
    names = [line.split(" | ")[0].strip("| ") for line in text.splitlines()]
    assert text in capsys.readouterr().out
    assert names[2:7] == ["base", "sft", "warm_up", "latro", "shuffled"]
    for name, steps in dict(warm_up=1, sft=2, latro=2, shuffled=2).items():
        assert len(rows(runs / name)) == steps
        before = json.loads((runs / name / "latro.json").read_text())["base"]
        assert before == str(TOY if name == "warm_up" else runs / "warm_up")
    first, second = (rows(runs / name, "samples")[1] for name in ("latro", "shuffled"))
    assert first["samples"][0]["z"] == second["samples"][0]["z"]  # the same model, before update 1
    started = len(in_process)
    real_model.main()
    assert len(in_process) == started


def test_a_slice_ends_in_time(tmp_path):
    """The deadline ends the command, and the exit code is MORE."""
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text("import time\ntime.sleep(60)\n")
    start = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        real_model.run_until(start + 1, [sleeper])
    assert stop.value.code == real_model.MORE and time.monotonic() - start < 30


def test_a_failed_command_is_an_error(tmp_path):
    """Its exit code is not mistaken for the end of a slice."""
    with pytest.raises(SystemExit, match="failed"):
        real_model.run_until(time.monotonic() + 60, [tmp_path / "nothing.py"])
