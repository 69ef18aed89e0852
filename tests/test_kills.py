"""kill -9 at fifty random instants: nothing that was complete is lost, and the run that goes on
after each of them is, bit by bit, the run that nobody disturbed."""

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, contents, rows, start, untimed
from transformers import AutoModelForCausalLM

import latro

FLAGS = [*TINY, *"--questions 1 --K 2 --L 4 --steps 5000 --save-every 1 --eval-every 7".split()]


def go(flags):
    """A run in a process of its own, with the one thread that makes it repeatable."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.dup2(2, 1)
    sys.exit(latro.main(flags))


@pytest.fixture(scope="module")
def processes():
    """Forks of a process that has all imports behind it: a start takes a tenth of a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["test_kills"])
        first = context.Process(target=int)  # all imports happen now
        first.start()
        first.join()
        yield context


def killed(processes, flags, over):
    """Seconds that a run lived until over(seconds)."""
    process, begun = processes.Process(target=go, args=(flags,)), time.monotonic()
    process.start()
    while not over(time.monotonic() - begun):
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return time.monotonic() - begun


def states(out):
    return [int(p.name.removeprefix("step-")) for p in (out / "state").glob("step-*")]


def test_kill_at_fifty_instants(processes, tmp_path):
    out, draw, last, during = tmp_path / "out", random.Random(0), 0, 0
    flags = [*FLAGS, "--out", str(out)]
    usual = killed(processes, flags, lambda _: states(out))  # until the first state is there
    for _ in range(50):
        end = usual * draw.uniform(0.5, 1.6)
        killed(processes, [*flags, "--resume"], lambda seconds: seconds > end)
        found = states(out)
        assert max(found, default=0) >= last  # no complete checkpoint is lost
        last = max(found, default=0)
        AutoModelForCausalLM.from_pretrained(out)
        during += (out / "state/incomplete").exists()
    assert last > 20 and during > 5  # it came forward, and was hit in the middle of saves
    assert not [*(out / "state").glob("damaged-*")]
    start(*FLAGS, "--resume", out=out, stop=last + 2)
    whole = start(*FLAGS, out=tmp_path / "whole", stop=last + 2)
    assert [row["step"] for row in rows(out)] == [*range(1, last + 3)]
    assert untimed(rows(out)) == untimed(rows(whole))
    assert rows(out, "evals") == rows(whole, "evals")
    assert rows(out, "samples") == rows(whole, "samples")
    weights = Path("model.safetensors")
    assert contents(out)[weights] == contents(whole)[weights]
