"""Proves that --log-to passes on every number and sample, and that a resumed run goes on there."""

import json

import pytest
from conftest import TINY, rows, start

import latro
from harness import trackers

FLAGS = [*TINY, "--steps", 4, "--save-every", 2]


@pytest.fixture
def logged(tmp_path, monkeypatch):
    """A function that runs two updates, then two more, and returns the directory of the run."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))

    def run(name):
        pytest.importorskip(name)
        out = start(*FLAGS, "--log-to", name, out=tmp_path / "out", stop=2)
        return start("--resume", out=out)
    return run


def wanted(out) -> dict[tuple[str, int], float]:
    """Every number in the JSONL files, by name and update."""
    return {(name, row["step"]): value for log in ("metrics", "evals") for row in rows(out, log)
            for name, value in trackers.numbers(log, row)}


def test_numbers_of_a_row():
    row = dict(step=3, reward=-1.5, kl=None, split="train", seconds=dict(sample=2.0), n=4)
    assert dict(trackers.numbers("metrics", row)) == {
        "metrics/reward": -1.5, "metrics/seconds/sample": 2.0, "metrics/n": 4}


def test_rows_pass_through(tmp_path, monkeypatch):
    """Everything that a run logs reaches a tracker, which is closed at the end."""
    seen, tables, closed = {}, [], []
    monkeypatch.setattr(trackers, "tensorboard", lambda args, start: trackers.Tracker(
        lambda values, step: seen.update({(name, step): v for name, v in values.items()}),
        lambda rows, step: tables.append((step, rows)), lambda: closed.append(start)))
    monkeypatch.setattr("harness.config.find_spec", lambda name: True)
    out = start(*FLAGS, "--log-to", "tensorboard", out=tmp_path / "out")
    assert seen == wanted(out) and ("metrics/seconds/backward", 4) in seen
    first = rows(out, "samples")[1]
    step, [(question, z, *_), *others] = tables[1]
    assert step == 1 and question == first["question"] and z == first["samples"][0]["z"]
    assert len(others) == len(first["samples"]) - 1 and closed == [0] and not trackers.TRACKERS


def test_tensorboard(logged):
    out = logged("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    found = {(tag, event.step): event.value for tag in events.Tags()["scalars"]
             for event in events.Scalars(tag)}
    assert found == pytest.approx(wanted(out), rel=1e-6)
    assert len(events.Tags()["tensors"]) == 1  # the samples


def test_wandb_goes_on_in_the_same_run(logged):
    out = logged("wandb")
    name = json.loads((out / "latro.json").read_text())["id"]
    assert len([*out.glob(f"wandb/offline-run-*-{name}")]) == 2  # two parts of one run


def test_trackio_goes_on_in_the_same_run(logged):
    out = logged("trackio")
    import trackio
    [run] = trackio.Api().runs("latro")
    assert run.name == json.loads((out / "latro.json").read_text())["id"]
    from trackio.sqlite_storage import SQLiteStorage
    found = SQLiteStorage.get_metric_values("latro", run.name, "metrics/reward")
    assert [row["value"] for row in found] == [row["reward"] for row in rows(out)]


def test_a_missing_package_is_said_at_once(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("harness.config.find_spec", lambda name: None)
    assert latro.main(["--log-to", "wandb", "--out", str(tmp_path / "out")]) == 1
    assert "pip install wandb" in capsys.readouterr().err and not (tmp_path / "out").exists()
