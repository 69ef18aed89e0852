"""The benchmark's harness at a toy's size on a CPU: what it times, refuses, writes and says."""

import json

import pytest
import torch

from conftest import ROOT, begin
from benchmarks import __main__ as command
from benchmarks import operations, timing
from benchmarks.operations import plain

PASSES = ["forward", "backward", "full"]
ENVIRONMENT = {"command", "date", "commit", "device", "torch", "triton", "liger_kernel",
               "cut_cross_entropy", "transformers", "trl"}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No peer is asked for, wherever the tests run; torch.compile would take most of the time."""
    monkeypatch.setattr(operations, "compiled", lambda fn: "not run: a test")
    monkeypatch.setattr(operations, "RATIONALES", [(2, 4, 8)])
    monkeypatch.setattr(operations, "ROWS", [16])


def run(out, *argv):
    """Exit code, and what the JSON holds."""
    code = command.main([*argv, "--rounds", "3", "--out", str(out)])
    return code, json.loads((out / f"{argv[0]}.json").read_text())


def check_times(row, passes):
    assert list(row["seconds"]) == list(row["fraction"]) == passes
    for t in row["seconds"].values():
        assert 0 < t["q1"] <= t["median"] <= t["q3"]


def test_logprob(tmp_path, capsys):
    """A row for every candidate, in JSON as in Markdown; those that cannot run say why."""
    code, held = run(tmp_path, "logprob", "--models", "toy", "--tokens", "32", "64", "--plot")
    printed, markdown = capsys.readouterr().out, (tmp_path / "logprob.md").read_text()
    assert code == 0 and set(held) == ENVIRONMENT | {"rows"}
    assert torch.__version__.startswith(held["torch"]) and "--tokens 32 64" in held["command"]
    names = {"floor", *operations.logprob_candidates()}
    for T in (32, 64):
        rows = {row["candidate"]: row for row in held["rows"] if row["T"] == T}
        assert set(rows) == names and (rows["floor"]["D"], rows["floor"]["V"]) == (64, 512)
        for name in ("floor", "reference", "plain"):
            check_times(rows[name], PASSES)
        assert max(rows["plain"]["error"].values()) < 1e-5
        assert set(rows["floor"]["fraction"].values()) == {1.0}
        ours = rows[timing.OURS]
        assert ours["note"] == operations.NO_CUDA and "seconds" not in ours
    for name in names:
        assert markdown.count(f"| {name} |") == printed.count(f"| {name} |") == 2
    assert (tmp_path / "logprob.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("frozen, results", [("weight", ["logp", "dH"]),
                                             ("hidden", ["logp", "dW"])])
def test_frozen(tmp_path, frozen, results):
    _, held = run(tmp_path, "logprob", "--tokens", "32", "--only", "plain", "--frozen", frozen)
    assert [list(row["error"]) for row in held["rows"] if "error" in row] == [results]


def test_chunked_products():
    """The floor in chunks of the vocabulary multiplies what the whole does."""
    H, W, *_ = operations.logprob_inputs(32, 64, 512)
    H.requires_grad_(), W.requires_grad_()
    z = (H @ W.T).detach()
    for free in (2**40, 2 * 32 * 4 * 256):
        dH, dW = operations.products(H, W, free)["full"]()()
        torch.testing.assert_close(dH, z @ W.detach())
        torch.testing.assert_close(dW, z.T @ H.detach())


def test_half_of_the_rows_are_sure():
    H, W, targets, _ = operations.logprob_inputs(512, 64, 512)
    p = plain(H, W, targets).exp()
    assert p[::2].median() > 0.9 and p[1::2].median() < 0.1


@pytest.mark.parametrize("wrong, named", [
    (lambda h, w, t: -plain(h, w, t), "logp is off by 2"),
    (lambda h, w, t: plain(h, w, t).nan_to_num() * torch.nan, "logp is off by nan"),
    (lambda h, w, t: 2 * plain(h, w, t) - plain(h, w, t).detach(), "dH is off by 1")])
def test_wrong_candidates_are_not_timed(tmp_path, monkeypatch, capsys, wrong, named):
    """A sign, not a number, right values with a wrong gradient."""
    monkeypatch.setattr(operations, "logprob_candidates", lambda: {"wrong": wrong, "plain": plain})
    code, held = run(tmp_path, "logprob", "--tokens", "32")
    rows = {row["candidate"]: row for row in held["rows"]}
    note = rows["wrong"]["note"]
    assert code == 1 and note.startswith("wrong: ") and named in note
    assert "seconds" not in rows["wrong"]
    check_times(rows["plain"], PASSES)
    assert capsys.readouterr().err.startswith("benchmarks: wrong is wrong: ")


def test_too_little_memory_is_a_row(tmp_path, monkeypatch):
    def hungry(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.83 GiB.")
    candidates = {"hungry": hungry, "plain": plain}
    monkeypatch.setattr(operations, "logprob_candidates", lambda: candidates)
    code, held = run(tmp_path, "logprob", "--tokens", "32")
    assert code == 0
    assert [row["note"] for row in held["rows"]] == [None, None, "CUDA out of memory"]


def test_a_compiler_that_fails_is_a_row(tmp_path, monkeypatch):
    def broken(*_):
        raise torch._dynamo.exc.Unsupported("graph break\nin user code")
    monkeypatch.setattr(operations, "logprob_candidates", lambda: dict(broken=broken, plain=plain))
    code, held = run(tmp_path, "logprob", "--tokens", "32")
    note = "cannot be compiled: Unsupported: graph break in user code"
    assert code == 0 and [row["note"] for row in held["rows"]] == [None, None, note]


def test_score(tmp_path):
    code, held = run(tmp_path, "score")
    assert code == 0 and {row["bound"] for row in held["rows"]} == {"elbo", "iwae"}
    for row in held["rows"]:
        if row["candidate"] in ("floor", "reference"):
            check_times(row, ["call"])


def test_sample(tmp_path, monkeypatch):
    """All ways of drawing are right; taking the top token every time is not drawing."""
    code, held = run(tmp_path, "sample")
    assert code == 0
    timed = {row["candidate"] for row in held["rows"] if "seconds" in row}
    assert timed == {"floor", "inverse", "multinomial", "gumbel"}
    task = operations.sample_task(64, 512)
    assert task.errors(lambda x: x.argmax(-1))["draws (sigma)"] > task.tolerance


def test_statistics():
    assert timing.quartiles([5.0, 1.0, 4.0, 2.0, 3.0]) == dict(q1=2.0, median=3.0, q3=4.0)
    assert timing.quartiles([1.0, 2.0]) == dict(q1=1.25, median=1.5, q3=1.75)
    assert timing.quartiles([7.0]) == dict(q1=7.0, median=7.0, q3=7.0)
    assert timing.relative(torch.tensor([1.0, -3.0]), torch.tensor([1.0, -4.0])) == 0.25


def test_fractions_ratios_order():
    def row(seconds):
        return dict(call=dict(q1=seconds, median=seconds, q3=seconds))
    rows = {name: dict(candidate=name) for name in ("floor", "untimed", "slow", "ours")}
    done = timing.compared(rows, {"floor": row(1.0), "slow": row(4.0), "ours": row(2.0)})
    assert [r["candidate"] for r in done] == ["floor", "ours", "slow", "untimed"]
    assert [r["fraction"]["call"] for r in done[:3]] == [1.0, 0.5, 0.25]
    assert [r["ratio"]["call"] for r in done[:3]] == [0.5, 1.0, 2.0]


@pytest.mark.parametrize("argv, named", [
    ("logprob --models nope", "'nope'"), ("logprob --rounds 0", "0"), ("logprob --tokens x", "x"),
    ("logprob --only nope", "nope"), ("tune", "CUDA"), ("nope", "'nope'"), ("", "command")])
def test_bad_input(tmp_path, capsys, monkeypatch, argv, named):
    monkeypatch.chdir(tmp_path)
    assert command.main(argv.split()) == 1
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1 and named in said.err


def test_out_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert command.main(["score", "--out", str(tmp_path / "file")]) == 1
    assert "name a directory" in capsys.readouterr().err


@pytest.mark.slow
def test_from_the_shell(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    process = begin("-m", "benchmarks", "logprob", "--tokens", 32, "--rounds", 2, "--only",
                    "plain", "--out", tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "| plain |" in out
