"""kill -9 at fifty random instants, and of one or both of two processes: nothing that was complete
is lost, and the run that goes on each time is, bit by bit, the run that nobody disturbed."""

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


def go(flags, stop, joined):
    """A run in a process of its own, with the one thread that makes it repeatable; SIGTERM arrives
    during the update numbered `stop`. `joined`: what torchrun would have set."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.dup2(2, 1)
    os.environ |= joined
    latro.optimizer_step = stopping(latro.optimizer_step, stop)
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


def begin(processes, flags, W=1, stop=None):
    """W processes of one run, which find each other as under torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    ranks = [place | dict(RANK=str(i), WORLD_SIZE=str(W)) for i in range(W)] if W > 1 else [{}]
    run = [processes.Process(target=go, args=(flags, stop, rank)) for rank in ranks]
    for process in run:
        process.start()
    return run


def killed(processes, flags, over, W=1, last=False):
    """Seconds that a run lived until over(seconds). Where only its last process is killed, the
    others must notice, and end."""
    run, begun = begin(processes, flags, W), time.monotonic()
    while not over(time.monotonic() - begun):
        assert all(process.is_alive() for process in run)
        time.sleep(0.01)
    for process in run[-1:] if last else run:
        os.kill(process.pid, signal.SIGKILL)
    lived = time.monotonic() - begun
    for process in run:
        process.join(60)
        assert process.exitcode in (1, -signal.SIGKILL)
    return lived


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
    same_run(out, whole, last + 2)


def same_run(ours, theirs, steps):
    assert [row["step"] for row in rows(ours)] == [*range(1, steps + 1)]
    assert untimed(rows(ours)) == untimed(rows(theirs))
    assert rows(ours, "evals") == rows(theirs, "evals")
    assert rows(ours, "samples") == rows(theirs, "samples")
    weights = Path("model.safetensors")
    assert contents(ours)[weights] == contents(theirs)[weights]


@pytest.mark.parametrize("numbers", [[2] * 5, [1, 2, 2, 1, 2]], ids=["2", "1 or 2"])
def test_kill_one_of_two_or_both(numbers, processes, tmp_path):
    """With as many processes each time the run ends bit-equal to one that nobody disturbed; with
    another number at least none of its updates is lost or done twice."""
    out, draw, last = tmp_path / "out", random.Random(1), 0
    flags = [*FLAGS, *"--questions 2 --timeout 0.5 --resume --out".split()]
    for i, W in enumerate(numbers):
        ahead = last + draw.randrange(2, 5)
        killed(processes, [*flags, str(out)], lambda _: max(states(out), default=0) >= ahead, W,
               last=i % 2 and W > 1)
        assert max(states(out)) >= ahead
        last = max(states(out))
        AutoModelForCausalLM.from_pretrained(out)
    alike, whole = len({*numbers}) == 1, tmp_path / "whole"
    for folder in (out, whole) if alike else [out]:
        for process in begin(processes, [*flags, str(folder)], numbers[-1], stop=last + 2):
            process.join(120)
            assert process.exitcode == 0
    if alike:
        same_run(out, whole, last + 2)
    assert [row["step"] for row in rows(out)] == [*range(1, last + 3)]
    assert [row["step"] for row in rows(out, "evals")] == [*range(0, last + 3, 7)]
