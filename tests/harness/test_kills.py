"""Proves that kill -9 loses no complete checkpoint: a run killed at fifty random times, or of which
one or both of two processes are killed, ends bit-equal to a run that was never disturbed."""

import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, contents, rows, start, stopping, untimed
from transformers import AutoModelForCausalLM

import latro

FLAGS = [*TINY, *"--questions 1 --K 2 --L 4 --steps 5000 --save-every 1 --eval-every 7".split()]


def run_latro(flags, stop, rank_variables):
    """A run, as the target of a process. SIGTERM arrives in the update numbered `stop`.
    `rank_variables`: the environment variables that torchrun would set."""
    torch.set_num_threads(1)  # one thread gives the same bits every time
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.dup2(2, 1)
    os.environ |= rank_variables
    latro.optimizer_step = stopping(latro.optimizer_step, stop)
    sys.exit(latro.main(flags))


@pytest.fixture(scope="module")
def processes():
    """Starts processes as forks of one that has imported everything: each takes 0.1 s to start."""
    folders = ROOT, ROOT / "tests", ROOT / "tests" / "harness"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["test_kills"])
        first = context.Process(target=int)  # the imports happen now
        first.start()
        first.join()
        yield context


def begin(processes, flags, W=1, stop=None):
    """Starts the W processes of one run, which find each other as under torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    ranks = [address | dict(RANK=str(i), WORLD_SIZE=str(W)) for i in range(W)] if W > 1 else [{}]
    run = [processes.Process(target=run_latro, args=(flags, stop, rank)) for rank in ranks]
    for process in run:
        process.start()
    return run


def run_until(processes, flags, reached, W=1, last_only=False):
    """Starts a run and kills it once reached(seconds). Returns the seconds it lived. With
    `last_only` only its last process is killed; the others must notice, and end."""
    run, started = begin(processes, flags, W), time.monotonic()
    while not reached(time.monotonic() - started):
        assert all(process.is_alive() for process in run)
        time.sleep(0.01)
    for process in run[-1:] if last_only else run:
        os.kill(process.pid, signal.SIGKILL)
    seconds = time.monotonic() - started
    for process in run:
        process.join(60)
        assert process.exitcode in (1, -signal.SIGKILL)
    return seconds


def states(out):
    """The steps of the complete states."""
    return [int(p.name.removeprefix("step-")) for p in (out / "state").glob("step-*")]


@pytest.mark.slow
def test_kill_at_fifty_random_times(processes, tmp_path):
    out, random_times, last, during_save = tmp_path / "out", random.Random(0), 0, 0
    flags = [*FLAGS, "--out", str(out)]
    usual = run_until(processes, flags, lambda _: states(out))  # seconds to the first state
    for _ in range(50):
        end = usual * random_times.uniform(0.5, 1.6)
        run_until(processes, [*flags, "--resume"], lambda seconds: seconds > end)
        newest = max(states(out), default=0)
        assert newest >= last  # no complete checkpoint is lost
        usual *= 0.95 if newest > last else 1.15  # follows the machine's speed
        last = newest
        AutoModelForCausalLM.from_pretrained(out)
        during_save += (out / "state/incomplete").exists()
    assert last > 20 and during_save > 5  # it made progress, and was hit in the middle of saves
    assert not [*(out / "state").glob("damaged-*")]
    start(*FLAGS, "--resume", out=out, stop=last + 2)
    whole = start(*FLAGS, out=tmp_path / "whole", stop=last + 2)
    assert_same_run(out, whole, last + 2)


def assert_same_run(ours, theirs, steps):
    assert [row["step"] for row in rows(ours)] == [*range(1, steps + 1)]
    assert untimed(rows(ours)) == untimed(rows(theirs))
    assert rows(ours, "evals") == rows(theirs, "evals")
    assert rows(ours, "samples") == rows(theirs, "samples")
    weights = Path("model.safetensors")
    assert contents(ours)[weights] == contents(theirs)[weights]


@pytest.mark.parametrize("numbers", [
    pytest.param([2] * 5, id="2", marks=pytest.mark.slow),
    pytest.param([1, 2, 2, 1, 2], id="1 or 2")])
@pytest.mark.slow
def test_kill_one_of_two_or_both(numbers, processes, tmp_path):
    """With the same number of processes each time, the run ends bit-equal to an undisturbed one.
    With changing numbers, no update is lost or done twice."""
    out, random_steps, last = tmp_path / "out", random.Random(1), 0
    flags = [*FLAGS, *"--questions 2 --timeout 0.5 --resume --out".split()]
    for i, W in enumerate(numbers):
        goal = last + random_steps.randrange(2, 5)
        run_until(processes, [*flags, str(out)], lambda _: max(states(out), default=0) >= goal, W,
                  last_only=i % 2 and W > 1)
        last = max(states(out))
        assert last >= goal
        AutoModelForCausalLM.from_pretrained(out)
    same_number, whole = len({*numbers}) == 1, tmp_path / "whole"
    for folder in (out, whole) if same_number else [out]:
        for process in begin(processes, [*flags, str(folder)], numbers[-1], stop=last + 2):
            process.join(120)
            assert process.exitcode == 0
    if same_number:
        assert_same_run(out, whole, last + 2)
    assert [row["step"] for row in rows(out)] == [*range(1, last + 3)]
    assert [row["step"] for row in rows(out, "evals")] == [*range(0, last + 3, 7)]
