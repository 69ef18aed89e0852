"""Proves that the benchmark of operations times only candidates whose results are right, and that
it records what its numbers depend on. At a toy's size on a CPU."""

import json
from types import SimpleNamespace

import pytest
import torch

from conftest import PRETENDED, ROOT, begin
from benchmarks import __main__ as command
from benchmarks import operations, timing
from benchmarks.operations import plain_logprobs

PASSES = ["forward", "backward", "full"]
ENVIRONMENT = {"command", "date", "commit", "device", "torch", "triton", "liger_kernel",
               "cut_cross_entropy", "quack_kernels", "nvidia_cutlass_dsl", "cuda_tile",
               "transformers", "trl"}


@pytest.fixture(autouse=True)
def small_and_not_compiled(monkeypatch):
    """torch.compile would take most of the time, and under the pretence the interpreted kernels."""
    monkeypatch.setattr(operations, "compiled", lambda function: "not run: a test")
    if PRETENDED:
        monkeypatch.setattr(timing, "WARM_UP", 0)
    monkeypatch.setattr(operations, "RATIONALES", [(2, 4, 8)])
    monkeypatch.setattr(operations, "ROWS", [16])


def run(out, *argv):
    """Exit code, and the contents of the JSON file."""
    code = command.main([*argv, "--rounds", "1" if PRETENDED else "3", "--out", str(out)])
    return code, json.loads((out / f"{argv[0]}.json").read_text())


def check_times(row, passes):
    assert list(row["seconds"]) == list(row["fraction"]) == passes
    for t in row["seconds"].values():
        assert 0 < t["q1"] <= t["median"] <= t["q3"]


def test_logprob(tmp_path, capsys):
    """JSON and Markdown have a row for every candidate; those that cannot run say why."""
    code, results = run(tmp_path, "logprob", "--models", "toy", "--tokens", "32", "64", "--plot")
    printed, markdown = capsys.readouterr().out, (tmp_path / "logprob.md").read_text()
    assert code == 0 and set(results) == ENVIRONMENT | {"rows"}
    assert torch.__version__.startswith(results["torch"])
    assert results["command"].startswith("python -m benchmarks logprob --models toy --tokens 32 64")
    names = {"floor", *operations.logprob_candidates()}
    for T in (32, 64):
        rows = {row["candidate"]: row for row in results["rows"] if row["T"] == T}
        assert set(rows) == names and (rows["floor"]["D"], rows["floor"]["V"]) == (64, 512)
        for name in ("floor", "reference", "plain"):
            check_times(rows[name], PASSES)
        assert max(rows["plain"]["error"].values()) < 1e-5
        assert {name: row["gemms"] for name, row in rows.items()} == operations.GEMMS
        assert set(rows["floor"]["fraction"].values()) == {1.0}
        ours = rows[timing.OURS]
        assert ours["note"] == operations.NO_CUDA and "seconds" not in ours
    for name in names:
        line = f"| {name} | {operations.GEMMS[name]} |"
        assert markdown.count(line) == printed.count(line) == 2
    assert (tmp_path / "logprob.png").read_bytes().startswith(b"\x89PNG")


def number_of_gemms(candidate, H, W, targets, upstream):
    """Matrix products of T x D x V in a full pass, by torch's profiler."""
    H, W = (x.clone().requires_grad_() for x in (H, W))
    with torch.profiler.profile(record_shapes=True) as profile:
        candidate(H, W, targets).backward(upstream)
    multiplications = 0
    first_factor = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}  # among its arguments
    for event in profile.events():
        if event.name in first_factor:
            (n, k), (_, m) = event.input_shapes[first_factor[event.name]:][:2]
            multiplications += n * k * m
    return multiplications / (len(H) * W.numel())


def test_gemms_are_as_many_as_the_label_says():
    """Of every candidate that runs on a CPU."""
    inputs = operations.logprob_inputs(256, 64, 4096)
    counted = {name: number_of_gemms(candidate, *inputs)
               for name, candidate in operations.logprob_candidates().items()
               if not isinstance(candidate, str)}
    assert {"reference", "plain"} <= set(counted)
    assert counted == {name: operations.GEMMS[name] for name in counted}


def their_cross_entropy(x, weight, bias, target, *, reduction, inplace_backward):
    """What QuACK's function computes, with its order of arguments."""
    return torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, weight, bias), target,
                                             reduction=reduction)


def liger_on_a_cpu():
    """Liger's function of the same signature as its kernels in CuTe and cuTile."""
    module = pytest.importorskip("liger_kernel.ops.fused_linear_scaled_cross_entropy",
                                 exc_type=ImportError)
    return module.LigerFusedLinearScaledCrossEntropyFunction


def trl_on_a_cpu():
    pytest.importorskip("accelerate", exc_type=ImportError)
    module = pytest.importorskip("trl.kernels.chunked_logprob", exc_type=ImportError)
    return module.ChunkedLogProbFunction


@pytest.mark.parametrize("function, call", [
    (lambda: their_cross_entropy, operations.quack), (liger_on_a_cpu, operations.liger_scaled),
    (trl_on_a_cpu, operations.trl)], ids=["quack", "liger", "trl"])
def test_a_rival_is_called_as_it_expects(function, call):
    """Values and gradients are those of the reference, for an upstream gradient per token."""
    candidate = operations.adapted(function(), call)
    task = operations.logprob_task("toy", 64, None, {})
    assert max(task.errors(candidate).values()) < 1e-5


def test_a_rival_that_is_missing_says_why():
    find = operations.find_function
    assert find("no_such_package.module", "f") == "not installed"
    assert find("json", "loads", "no_such.module") == "not installed: no_such.module"
    assert find("json", "loads") == operations.NO_CUDA
    assert find("json", "loads", cuda=False) is json.loads
    note = find("json", "no_such_function", cuda=False)
    assert note.startswith("cannot be imported: AttributeError")


@pytest.mark.parametrize("frozen, names", [("weight", ["logp", "dH"]), ("hidden", ["logp", "dW"])])
def test_frozen(tmp_path, frozen, names):
    _, results = run(tmp_path, "logprob", "--tokens", "32", "--only", "plain", "--frozen", frozen)
    assert [list(row["error"]) for row in results["rows"] if "error" in row] == [names]


def test_chunked_products():
    """The floor in chunks of the vocabulary computes the same products as in one piece."""
    H, W, *_ = operations.logprob_inputs(32, 64, 512)
    H.requires_grad_()
    W.requires_grad_()
    z = (H @ W.T).detach()
    for free in (2**40, 2 * 32 * 4 * 256):
        dH, dW = operations.matrix_products(H, W, free)["full"]()()
        torch.testing.assert_close(dH, z @ W.detach())
        torch.testing.assert_close(dW, z.T @ H.detach())


def test_half_of_the_rows_are_sure_of_their_target():
    H, W, targets, _ = operations.logprob_inputs(512, 64, 512)
    p = plain_logprobs(H, W, targets).exp()
    assert p[::2].median() > 0.9 and p[1::2].median() < 0.1


def wrong_sign(h, w, t):
    return -plain_logprobs(h, w, t)


def all_nan(h, w, t):
    return plain_logprobs(h, w, t).nan_to_num() * torch.nan


def doubled_gradient(h, w, t):
    """The right values."""
    return 2 * plain_logprobs(h, w, t) - plain_logprobs(h, w, t).detach()


@pytest.mark.parametrize("wrong, message", [
    (wrong_sign, "logp is off by 2"), (all_nan, "logp is off by nan"),
    (doubled_gradient, "dH is off by 1")])
def test_wrong_candidates_are_not_timed(tmp_path, monkeypatch, capsys, wrong, message):
    candidates = {"wrong": wrong, "plain": plain_logprobs}
    monkeypatch.setattr(operations, "logprob_candidates", lambda: candidates)
    code, results = run(tmp_path, "logprob", "--tokens", "32")
    rows = {row["candidate"]: row for row in results["rows"]}
    note = rows["wrong"]["note"]
    assert code == 1 and note.startswith("wrong: ") and message in note
    assert "seconds" not in rows["wrong"]
    check_times(rows["plain"], PASSES)
    assert capsys.readouterr().err.startswith("benchmarks: wrong is wrong: ")


def notes_with(tmp_path, monkeypatch, candidate):
    """Notes of the rows floor, plain_logprobs and `candidate`, of a run with exit code 0."""
    candidates = dict(candidate=candidate, plain=plain_logprobs)
    monkeypatch.setattr(operations, "logprob_candidates", lambda: candidates)
    code, results = run(tmp_path, "logprob", "--tokens", "32")
    assert code == 0
    return [row["note"] for row in results["rows"]]


def test_running_out_of_memory_is_a_note(tmp_path, monkeypatch):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.83 GiB.")
    assert notes_with(tmp_path, monkeypatch, out_of_memory) == [None, None, "CUDA out of memory"]


def test_a_failing_compiler_is_a_note(tmp_path, monkeypatch):
    def cannot_be_compiled(*_):
        raise torch._dynamo.exc.Unsupported("graph break\nin user code")
    note = "cannot be compiled: Unsupported: graph break in user code"
    assert notes_with(tmp_path, monkeypatch, cannot_be_compiled) == [None, None, note]


def test_score(tmp_path):
    code, results = run(tmp_path, "score")
    assert code == 0 and {row["bound"] for row in results["rows"]} == {"elbo", "iwae"}
    for row in results["rows"]:
        if row["candidate"] in ("floor", "reference"):
            check_times(row, ["call"])


def test_sample(tmp_path):
    """Every way to draw is right. Always taking the most likely token is found to be wrong."""
    code, results = run(tmp_path, "sample")
    assert code == 0
    timed = {row["candidate"] for row in results["rows"] if "seconds" in row}
    assert timed == {"floor", "inverse", "multinomial", "gumbel"}
    task = operations.sample_task(64, 512)
    assert task.errors(lambda logits: logits.argmax(-1))["draws (sigma)"] > task.tolerance


def test_tune_changes_the_settings_of_the_kernel(monkeypatch):
    """Each candidate launches with its own settings, and the defaults are back afterwards. Nothing
    is launched here: a stub takes the kernel's place."""
    kernel = pytest.importorskip("kernels.token_logprob")
    seen, before = [], (kernel.tile_for, kernel.DZ_BYTES)
    monkeypatch.setattr(operations, "device", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(kernel, "token_logprobs", lambda hidden, weight, targets: seen.append(
        (kernel.tile_for(hidden, weight), kernel.DZ_BYTES)))
    tasks = operations.tune(SimpleNamespace(models=["toy"], tokens=[32], frozen=None))
    _, _, _, candidates = next(tasks).args
    operands = torch.zeros(4, 64), torch.zeros(9, 64), None
    names = timing.OURS, "dZ of 2^27 bytes", "128x256x64, 8 warps, 3 stages, TMA", timing.OURS
    for name in names:
        candidates[name](*operands)
    default = before[0](*operands[:2]), before[1]
    tile = kernel.Tile(128, 256, 64, 8, 3, tma=True)
    assert seen == [default, (default[0], 2**27), (tile, default[1]), default]
    candidates[names[2]](*operands)
    assert not list(tasks) and (kernel.tile_for, kernel.DZ_BYTES) == before


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["logprob", "score", "sample", "tune"])
def test_on_a_gpu(tmp_path, monkeypatch, name):
    """Our kernels and every setting of `tune` are right, and timed with a cold cache. Passes that
    return new tensors also count their memory."""
    monkeypatch.setattr(operations, "TILES", {(64, 64, 32, 4): (2, 3)})
    sizes = dict(sample=["--models", "toy"], score=[]).get(
        name, ["--models", "toy", "--tokens", "64"])
    if PRETENDED and name == "tune":
        sizes += ["--only", "ours", "dZ of 2^26 bytes", "64x64x32, 4 warps, 2 stages",
                  "64x64x32, 4 warps, 2 stages, TMA"]
    code, results = run(tmp_path, name, *sizes, *(["--plot"] if name == "logprob" else []))
    assert code == 0 and results["device"] == torch.cuda.get_device_name()
    names = {row["candidate"] for row in results["rows"] if "seconds" in row}
    assert "inverse" in names if name == "sample" else timing.OURS in names
    if name == "tune":
        assert {"dZ of 2^26 bytes", "64x64x32, 4 warps, 2 stages"} <= names
    for row in results["rows"]:
        if "seconds" in row and row["candidate"] != "floor":
            assert all(size >= 0 for size in row["peak_bytes"].values()), row


def test_quartiles_and_relative_error():
    assert timing.quartiles([5.0, 1.0, 4.0, 2.0, 3.0]) == dict(q1=2.0, median=3.0, q3=4.0)
    assert timing.quartiles([1.0, 2.0]) == dict(q1=1.25, median=1.5, q3=1.75)
    assert timing.quartiles([7.0]) == dict(q1=7.0, median=7.0, q3=7.0)
    assert timing.relative_error(torch.tensor([1.0, -3.0]), torch.tensor([1.0, -4.0])) == 0.25


def test_fractions_ratios_and_order():
    def row(seconds):
        return dict(call=dict(q1=seconds, median=seconds, q3=seconds))
    rows = {name: dict(candidate=name) for name in ("floor", "untimed", "slow", "ours")}
    times = {"floor": row(1.0), "slow": row(4.0), "ours": row(2.0)}
    found = timing.compare_rows(rows, times)
    assert [r["candidate"] for r in found] == ["floor", "ours", "slow", "untimed"]
    assert [r["fraction"]["call"] for r in found[:3]] == [1.0, 0.5, 0.25]
    assert [r["ratio"]["call"] for r in found[:3]] == [0.5, 1.0, 2.0]


@pytest.mark.parametrize("argv, message", [
    ("logprob --models nope", "'nope'"), ("logprob --rounds 0", "0"), ("logprob --tokens x", "x"),
    ("logprob --only nope", "nope"), ("tune", "CUDA"), ("nope", "'nope'"), ("", "command")])
def test_bad_input(tmp_path, capsys, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    assert command.main(argv.split()) == 1
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and message in err


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
