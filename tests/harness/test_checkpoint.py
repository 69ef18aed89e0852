"""Proves that damaged or harmful files, full disks, and processes that die or hang cost a run at
most the updates since its last whole state, and that each error says what to do."""

import ctypes
import io
import json
import math
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from shutil import copytree, which

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this file is also a script
from conftest import ROOT, TINY, TOY, begin, contents, launch, rows, start, under_way, untimed

import latro  # after conftest, which puts the repository on the path
from harness import checkpoint, distributed
from harness.errors import run_cli, timed

FLAGS = [*TINY, *"--K 2 --L 6 --steps 3 --save-every 1".split()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of three updates. The states of the last two are kept."""
    out = start(*FLAGS, out=tmp_path_factory.mktemp("whole") / "out")
    assert sorted(p.name for p in out.glob("state/step-*")) == ["step-000002", "step-000003"]
    return out


@pytest.fixture
def out(whole, tmp_path):
    return copytree(whole, tmp_path / "out")


def damaged(path, how):
    """The bytes of a file, damaged in one of four ways."""
    before = path.read_bytes()
    middle = len(before) // 2
    return dict(truncated=before[:middle], empty=b"", longer=before + b"\0",
                flipped=before[:middle] + bytes([before[middle] ^ 1]) + before[middle + 1:])[how]


# ---- files

@pytest.mark.parametrize("how", ["truncated", "empty", "longer", "flipped", "gone"])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "sums.json"])
def test_damaged_state(name, how, out, whole, capsys):
    """The run goes on from the state before it, and ends as if nothing had happened."""
    path = out / "state/step-000003" / name
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(damaged(path, how))
    if name == "sums.json" and how in ("longer", "flipped"):  # may still be JSON
        path.write_text(path.read_text(errors="replace").replace(":", ": 1"))
    start("--resume", out=out)
    printed = capsys.readouterr().out
    assert str(path) in printed and "going back from step-000003" in printed
    assert untimed(rows(out)) == untimed(rows(whole))
    weights = Path("model.safetensors")
    assert contents(out)[weights] == contents(whole)[weights]
    kept = sorted(p.name for p in (out / "state").glob("step-*"))
    assert kept == ["step-000002", "step-000003"]
    assert len([*(out / "state").glob("damaged-*")]) == 1


def test_no_whole_state(out, capsys):
    """That is an error, not a silent new start: the logs and the model stay as they were."""
    for state in (out / "state").glob("step-*"):
        (state / "__0_0.distcp").write_bytes(b"torn")
    before = {k: v for k, v in contents(out).items() if len(k.parts) == 1}
    assert latro.main(["--resume", "--out", str(out)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"--model {out}" in error and "no state" in error
    assert before == {k: v for k, v in contents(out).items() if len(k.parts) == 1}


@pytest.mark.parametrize("keep, names", [(1, [3]), (2, [2, 3]), (5, [1, 2, 3])])
def test_number_of_states_kept(keep, names, tmp_path):
    out = start(*FLAGS, "--keep", keep, out=tmp_path / "out")
    assert sorted(int(p.name[-6:]) for p in (out / "state").glob("step-*")) == names


def test_atomic_write_replaces_a_file_or_leaves_it(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("full")
    path = tmp_path / "x.json"
    checkpoint.atomic_write(path, "before")
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "replace", fail)
        checkpoint.atomic_write(path, "after")
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"] and path.read_text() == "before"


@pytest.mark.parametrize("largest", [1000, 100_000, 2_000_000, 5_000_000])
def test_full_disk(largest, out, whole, monkeypatch, capsys):
    """No file may grow beyond `largest` bytes while the third update is saved. The save fails with
    one sentence, and what was there before stays whole. Without the limit, the run then ends as
    usual."""
    for name in ("state/step-000003", "state/step-000002"):
        (out / name).rename(out / "state" / name[-1])
    (out / "state/2").rename(out / "state/step-000002")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*args, save_checkpoint=latro.save_checkpoint):
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
        try:
            save_checkpoint(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with monkeypatch.context() as patch:
        patch.setattr(latro, "save_checkpoint", limited)
        assert latro.main(["--resume", "--out", str(out)]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("latro.py: ") and "cannot be saved" in line
    assert "GB are free" in line and "--resume" in line
    assert not {"incomplete", "export"} & {p.name for p in (out / "state").iterdir()}
    assert [p.name for p in out.glob("state/step-*")] == ["step-000002"]
    AutoModelForCausalLM.from_pretrained(out)
    assert not [p for p in out.rglob("*.new")]
    start("--resume", out=out)
    assert untimed(rows(out)) == untimed(rows(whole))
    assert contents(out)[Path("model.safetensors")] == contents(whole)[Path("model.safetensors")]


@pytest.mark.parametrize("out", ["/proc/nothing/here", "/dev/null/out"])
def test_out_that_cannot_be_made(out, capsys):
    assert latro.main([*FLAGS, "--out", out]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("latro.py: ") and out.split("/")[1] in line


FULL = """mount -t tmpfs -o size=$1m none "$2" || exit 77
shift; out=$1/run; shift
"$@" --out "$out"; echo "code $?: $(ls "$out/state" | tail -1)"
mount -o remount,size=99m "$(dirname "$out")"
"$@" --resume --out "$out"; echo "code $?: $(ls "$out/state" | tail -1)"
cp -r "$out" ."""


@pytest.mark.parametrize("size, kept", [(5, "lock"), (14, "step-000001"), (21, "step-000002")])
@pytest.mark.slow
def test_full_file_system(size, kept, whole, tmp_path):
    """The same on a file system of `size` MB, which the first, second or third state fills."""
    (tmp_path / "small").mkdir()
    command = ["unshare", "-rm", "sh", "-c", FULL, "sh", size, tmp_path / "small", sys.executable,
               ROOT / "latro.py", *FLAGS]
    if not which("unshare"):
        pytest.skip("no unshare here")
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=tmp_path,
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    if "code" not in done.stdout:
        pytest.skip("file systems cannot be mounted here")
    assert re.findall(r"code (.*)", done.stdout) == [f"1: {kept}", "0: step-000003"]
    [line] = [s for s in done.stderr.splitlines() if "cannot be saved" in s]
    assert "Traceback" not in done.stderr and "0.0 GB are free" in line and "--resume" in line
    assert untimed(rows(tmp_path / "run")) == untimed(rows(whole))


def drop_root_override():
    """Runs in a new process before it starts: permissions then hold for root too."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE


@pytest.mark.parametrize("flags", [FLAGS, ["--resume"]], ids=["new", "resumed"])
@pytest.mark.slow
def test_read_only_out(flags, out, whole, tmp_path):
    """Nothing in it is touched, and the run goes on once it can be written."""
    folder = out if "--resume" in flags else tmp_path / "new"
    folder.mkdir(exist_ok=True)
    before = contents(tmp_path)
    folder.chmod(0o555)
    try:
        run = begin(ROOT / "latro.py", *flags, "--out", folder, preexec_fn=drop_root_override)
        _, errors = run.communicate(timeout=300)
    finally:
        folder.chmod(0o755)
    line = errors.splitlines()[-1]
    assert run.returncode == 1 and "Traceback" not in errors
    assert line.startswith("latro.py: ") and str(folder) in line
    assert contents(tmp_path) == before
    start(*flags, out=folder)
    assert untimed(rows(folder)) == untimed(rows(whole))


class Evil:
    """Its pickle calls a function when it is loaded."""

    def __init__(self, call, *args):
        self.call = call, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("evil", [
    Evil(os.system, "touch harm"), Evil(eval, "open('harm', 'w')"), Evil(Path.touch, Path("harm")),
    Evil(getattr, os.stat_result, "mro"), [1, dict(a=Evil(os.mkdir, "harm"))],
    Evil(__import__, "antigravity"), Evil(torch.load, "x"), Evil(subprocess.call, "touch harm")])
def test_pickle_that_would_run_code(evil, out, tmp_path, monkeypatch, capsys):
    """Also with matching checksums, which anyone can compute. Nothing is run, and the run does not
    go back to an older state."""
    monkeypatch.chdir(tmp_path)
    state = out / "state/step-000003"
    (state / ".metadata").write_bytes(pickle.dumps(evil))
    sums = json.loads((state / "sums.json").read_text())
    sums[".metadata"] = checkpoint.checksum(state / ".metadata")
    (state / "sums.json").write_text(json.dumps(sums))
    before = contents(out)
    assert latro.main(["--resume", "--out", str(out)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert ".metadata is not what a run writes" in error and "do not trust" in error
    assert not Path("harm").exists() and contents(out) == before


def test_dotted_names_reach_nothing():
    """Pickle protocol 4 follows dotted names. An allowed module must not give access to what it
    imports."""
    for module in ("torch.distributed.checkpoint.metadata", "torch"):
        for name in ("os.system", "os", "load", "dataclass"):
            code = pickle.PROTO + b"\x04" + b"".join(
                pickle.SHORT_BINUNICODE + bytes([len(part)]) + part.encode()
                for part in (module, name)) + pickle.STACK_GLOBAL + pickle.STOP
            with pytest.raises(pickle.UnpicklingError, match=name):
                checkpoint.RestrictedUnpickler(io.BytesIO(code)).load()


# ---- a directory in use

@pytest.mark.slow
def test_out_of_a_run_that_is_still_alive(tmp_path):
    out = tmp_path / "out"
    with under_way(out) as run:
        code, _, errors = launch("--resume", "--out", out)
        assert code == 1 and f"--out {out}" in errors and "still alive" in errors
    run.wait(60)  # killed: its lock goes with it
    try:
        assert checkpoint.acquire_lock(out / "state/lock")
    finally:
        checkpoint.release_lock()


@pytest.mark.parametrize("replaced", [False, True])
def test_out_that_moves_during_the_run(replaced, whole, tmp_path, monkeypatch, capsys):
    """Its old name may be another run's: nothing is written there. The run goes on where it is."""
    out, moved = tmp_path / "out", tmp_path / "moved"
    optimizer_step = latro.optimizer_step

    def move_then_step(policy, optimizer, step, args):
        if step == 1:
            out.rename(moved)
            if replaced:
                copytree(whole, out)
        return optimizer_step(policy, optimizer, step, args)
    monkeypatch.setattr(latro, "optimizer_step", move_then_step)
    assert latro.main([*FLAGS, "--out", str(out)]) == 1
    assert f"--out {out}: moved or deleted" in capsys.readouterr().err
    assert contents(out) == (contents(whole) if replaced else {})
    monkeypatch.undo()
    start("--resume", out=moved)
    assert untimed(rows(moved)) == untimed(rows(whole))


def test_lock_is_released(out):
    start("--resume", out=out)
    assert checkpoint.LOCKS == []


# ---- processes

@pytest.mark.slow
def test_restart_by_torchrun_goes_on(whole, tmp_path):
    """A worker is killed in its second update. torchrun restarts all workers, and they resume."""
    out = tmp_path / "out"
    code, _, errors = launch("die", *FLAGS, "--out", out, processes=2, script=__file__,
                             torchrun=["--max-restarts", 1])
    assert code == 0, errors[-3000:]
    assert [row["step"] for row in rows(out)] == [1, 2, 3]
    assert [row["step"] for row in rows(out, "evals")] == [0, 3]
    assert rows(out)[0]["z_len"] == rows(whole)[0]["z_len"]


@pytest.mark.slow
def test_a_process_that_hangs(tmp_path):
    """The others wait for --timeout, then end with one sentence."""
    started = time.monotonic()
    code, _, errors = launch("hang", *FLAGS, "--out", tmp_path / "out", "--timeout", 0.1,
                             processes=2, script=__file__)
    assert code != 0 and time.monotonic() - started < 120
    [line] = [s for s in errors.splitlines() if "latro.py: " in s]
    assert "hung longer than --timeout" in line and "--resume" in line
    assert f'File "{ROOT / "latro.py"}"' not in errors


@pytest.mark.slow
def test_one_process_with_log_probs_that_are_not_finite(tmp_path):
    """All processes stop in the same update, and one sentence names the question concerned."""
    out = tmp_path / "out"
    code, _, errors = launch("nan", *FLAGS, "--out", out, processes=2, script=__file__)
    [line] = [s for s in errors.splitlines() if "latro.py: " in s]
    [where] = re.findall(r"train.jsonl:\d+", line)
    assert code != 0 and "update 2" in line and "--lr" in line
    assert (out / "poisoned").read_text().endswith(where)
    assert [row["step"] for row in rows(out)] == [1]
    assert [p.name for p in out.glob("state/step-*")] == ["step-000001"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.slow
def test_second_stop_signal_ends_a_run_at_once(number, tmp_path):
    """After one signal a run finishes its update, which hangs here. The second signal ends it, and
    the state before stays whole."""
    out = tmp_path / "out"
    run = begin(__file__, "hang", *FLAGS, "--out", out)
    try:
        while not (out / "state/step-000001/sums.json").exists():
            assert run.poll() is None
            time.sleep(0.1)
        time.sleep(2)
        run.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            run.wait(2)
        run.send_signal(number)
        assert run.wait(5) == -number
    finally:
        run.kill()
    assert [row["step"] for row in rows(out)] == [1]
    AutoModelForCausalLM.from_pretrained(out)
    start("--resume", out=out)
    assert [row["step"] for row in rows(out)] == [1, 2, 3]


def test_what_a_model_writes_cannot_control_a_terminal(out, capsys):
    """Nor can file names or data: \\x1b is printed as text."""
    log = out / "samples.jsonl"
    log.write_text(log.read_text().replace('"text": "', '"text": "\\u001b]0;owned\\u0007'))
    start("--resume", out=out)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\\x1b]0;owned\\x07" in printed
    assert latro.main(["--model", "\x1b[2J", "--task", "toy"]) == 1
    printed = capsys.readouterr().err
    assert "\x1b" not in printed and "\\x1b[2J" in printed


@pytest.mark.parametrize("error, words", [
    (RuntimeError("[gloo] Timed out waiting 6000ms for recv operation to complete"), "has died"),
    (RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:2048"), "has died"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "lower --K"),
    (RuntimeError("shape '[2, 3]' is invalid"), None), (IndexError("timeout"), None)])
def test_only_bugs_have_a_traceback(error, words, capsys):
    """Errors caused by the machine or by another process are one sentence."""
    def work():
        raise error
    if words:
        assert run_cli("latro.py", work, "--K", "") == 1
        assert words in capsys.readouterr().err
    else:
        with pytest.raises(type(error)):
            run_cli("latro.py", work, "", "")


@pytest.mark.parametrize("phase, flags", [
    ("sample", "--K, --L or --questions"), ("score", "--micro, --K or --L"),
    ("backward", "--micro, --K or --L"), ("step", "more GPUs")])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_out_of_memory_names_the_phase(phase, flags, rank, monkeypatch, capsys):
    """Whichever process runs out of memory reports it."""
    environment = dict(RANK=rank, WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="0")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def work():
        with timed({phase: 0.0}, phase):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert run_cli("latro.py", work, "", "") == 1
    line, = capsys.readouterr().err.splitlines()
    assert f"in {phase}," in line and flags in line and "GB at the peak" in line


# ---- models that are not what they seem

@pytest.fixture
def model(tmp_path):
    return copytree(TOY, tmp_path / "model")


def assert_refused(model, capsys, *words):
    """--model `model` ends with one line that has these words, and --out is not made."""
    flags = ["--model", str(model), "--task", "toy", *TINY, "--steps", "1"]
    assert latro.main([*flags, "--out", str(model.parent / "fresh")]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"latro.py: --model {model}") and all(w in line for w in words), line
    assert not (model.parent / "fresh").exists()


@pytest.mark.parametrize("how", ["truncated", "empty"])
def test_damaged_weights(how, model, capsys):
    path = model / "model.safetensors"
    path.write_bytes(damaged(path, how))
    assert_refused(model, capsys, "weights cannot be read")


def test_missing_weights_are_not_made_up(model, capsys):
    """transformers would initialize them at random, and only warn."""
    weights = load_file(model / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert_refused(model, capsys, "model.layers.1.mlp.up_proj.weight")


def test_weights_of_another_shape(model, capsys):
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert_refused(model, capsys, "weights cannot be read")


def test_larger_vocabulary_than_embedding(model, capsys):
    config = json.loads((model / "config.json").read_text())
    config["vocab_size"] -= 3
    (model / "config.json").write_text(json.dumps(config))
    assert_refused(model, capsys, "tokenizer", str(config["vocab_size"]), "embedding")


@pytest.mark.parametrize("method", ["fp8", "gptq", "bitsandbytes", "compressed-tensors", "new"])
def test_quantised_weights_are_not_trained(method, model, capsys):
    """Whether or not a loader is installed: FP8's scales would be lost without a word on a GPU."""
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = dict(quant_method=method)
    (model / "config.json").write_text(json.dumps(config))
    assert_refused(model, capsys, "quantised", "dequantize()")


@pytest.mark.parametrize("kind", ["llama", "new"])
def test_code_in_a_model_directory_is_not_run(kind, model, tmp_path, monkeypatch, capsys):
    """Nor is the user asked whether to run it: nobody would be there to answer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    (model / "evil.py").write_text("open('harm', 'w')\nclass Config: pass\nclass Model: pass\n")
    config = json.loads((model / "config.json").read_text())
    classes = dict(AutoConfig="evil.Config", AutoModelForCausalLM="evil.Model")
    config |= dict(auto_map=classes) | (dict(model_type="evil") if kind == "new" else {})
    (model / "config.json").write_text(json.dumps(config))
    if kind == "new":
        assert_refused(model, capsys)
    else:
        start("--model", model, "--task", "toy", *TINY, "--steps", 1, out=tmp_path / "fresh")
    assert not Path("harm").exists()


def test_pickled_weights_are_not_read(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(os.system, "touch harm")))
    assert_refused(model, capsys, "safetensors")
    assert not Path("harm").exists()


WATCH = """import os, socket, sys
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "os.system"):
        os.write(2, f"asked: {event} {args}\\n".encode())
    if event == "subprocess.Popen" and os.path.basename(args[0]) not in ("git", "ldconfig"):
        os.write(2, f"asked: {event} {args}\\n".encode())
sys.addaudithook(watch)
"""
RUN = """sys.path.insert(0, sys.argv[1])
import latro
sys.exit(latro.main(sys.argv[2:]))"""


@pytest.mark.slow
def test_no_network_and_no_shell(tmp_path, monkeypatch):
    """A run with local files, without HF_HUB_OFFLINE, opens no connection, looks up no name, and
    starts no process except git for the commit, and ldconfig, by which a torch with CUDA finds
    libraries."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    run = begin("-c", WATCH + RUN, ROOT, *FLAGS, "--out", tmp_path / "out")
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 0 and "asked" not in errors, errors
    run = begin("-c", WATCH + "socket.getaddrinfo('localhost', 80)")
    assert "asked: socket" in run.communicate(timeout=60)[1]  # the hook works


def failing(optimizer_step, how):
    """optimizer_step, in the second call of which the last process dies (once), or hangs."""
    def wrapped(policy, optimizer, step, args):
        last = distributed.processes() == 1 or not distributed.is_main_process()
        if step == 1 and last and not distributed.restart_count():
            if distributed.processes() > 1:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun need not wait for it
            if how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
        return optimizer_step(policy, optimizer, step, args)
    return wrapped


def with_nan(score):
    """latro.score, which returns NaN on the last process in the second update, and writes the place
    of that question to --out/poisoned."""
    updates = 0

    def wrapped(policy, reference, examples, groups, args, given=False):
        nonlocal updates
        logp, scores = score(policy, reference, examples, groups, args, given)
        updates += torch.is_grad_enabled()  # not in an evaluation
        if updates != 2 or distributed.is_main_process():
            return logp, scores
        [example] = examples
        Path(args.out, "poisoned").write_text(example.place)
        return logp, scores._replace(logp_y=scores.logp_y * math.nan)
    return wrapped


if __name__ == "__main__":
    if sys.argv[1] == "nan":
        latro.score = with_nan(latro.score)
    else:
        latro.optimizer_step = failing(latro.optimizer_step, sys.argv[1])
    sys.exit(latro.main(sys.argv[2:]))
