"""The benchmark of whole loops at a toy's size on a CPU: that its candidates do the same work, what
it counts, and that a candidate which does something else is found out."""

import json
import math
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import latro
from conftest import TOY
from harness import distributed, model
from kernels import decode
from benchmarks import __main__ as command
from benchmarks import loops, rivals
from benchmarks import work as shared
from test_graphs import Tape

SMALL = "--questions 2 --K 3 --L 12 --rounds 2".split()


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """TRL is there only where a test brings it; torch.compile would take most of the time."""
    for module in (loops, command):
        monkeypatch.setattr(module, "find_spec", lambda name: name != "trl" and find_spec(name))
    monkeypatch.setattr(loops, "uncompilable", lambda: "not run: a test")


def run(out, *argv):
    """Exit code, and the rows by candidate."""
    code = command.main([*argv, *SMALL, "--out", str(out)])
    held = json.loads((out / f"{argv[0]}.json").read_text())
    return code, {row["candidate"]: row for row in held["rows"]}


@pytest.fixture
def work():
    """Makes models and questions, for training unless told otherwise."""
    distributed.init_distributed()
    yield lambda B=2, K=3, L=12, train=True: shared.Work(
        "toy", SimpleNamespace(questions=B, K=K, L=L), train)
    dist.destroy_process_group()


def test_rollout(tmp_path):
    code, rows = run(tmp_path, "rollout", "--plot")
    assert code == 0 and rows.pop("compiled")["note"] == "not run: a test"
    assert set(rows) == {"floor", "ours", "generate", "static", "released"}
    N, tokens = 2 * 3, rows["ours"]["tokens"]
    for name, row in rows.items():
        seconds = row["seconds"]["rollout"]["median"]
        assert list(row["phases"]) == ["sample"] and seconds > 0
        assert row["fraction"]["rollout"] == rows["floor"]["seconds"]["rollout"]["median"] / seconds
        assert row["ratio"]["rollout"] == seconds / rows["ours"]["seconds"]["rollout"]["median"]
        if name == "floor":
            assert set(row["figures"]) == {"GB/s"}
        else:
            assert row["error"] == dict(lengths=0, tokens=0)
            assert math.isclose(row["figures"]["rationales/s"], N / seconds)
            assert math.isclose(row["figures"]["tokens/s"], tokens / seconds)
    assert "| ours |" in (tmp_path / "rollout.md").read_text()
    assert (tmp_path / "rollout.png").read_bytes().startswith(b"\x89PNG")


def test_decode(tmp_path, monkeypatch):
    """A step, and one that is recorded: a tape stands for the CUDA graph."""
    code, rows = run(tmp_path, "decode")
    assert code == 0 and rows["eager"]["note"].startswith("the same") and rows["ours"]["rows"] == 6
    monkeypatch.setitem(decode.PACES, "cpu", decode.Pace(3, 8, True))
    monkeypatch.setattr(decode, "capture_graph", lambda function, before: Tape(function))
    monkeypatch.setattr(decode.CUDAGraphRunner, "latest", None)
    code, rows = run(tmp_path, "decode")
    assert code == 0 and rows["ours"]["error"] == dict(logits=0) == rows["eager"]["error"]
    assert 0 < rows["ours"]["fraction"]["step"]


def test_update(tmp_path):
    code, rows = run(tmp_path, "update", "--plot")
    assert code == 0 and rows["trl"]["note"] == "not installed"
    limit = rows["floor"]["phases"]
    for name in ("ours", "released"):
        phases, figures = rows[name]["phases"], rows[name]["figures"]
        assert list(phases) == ["sample", "score", "backward", "step"] and min(phases.values()) > 0
        assert sum(phases.values()) == pytest.approx(rows[name]["seconds"]["update"]["median"], 0.2)
        learning = phases["score"] + phases["backward"]
        assert figures["MFU"] == (limit["score"] + limit["backward"]) / learning
        assert figures["of decode limit"] == limit["sample"] / phases["sample"]
        assert rows[name]["error"]["lengths"] == rows[name]["error"]["tokens"] == 0
    assert rows["released"]["error"]["gradient"] < 1e-4
    assert set(rows["floor"]["figures"]) == {"GB/s", "TFLOP/s"}
    head = "| sample / score / backward / step, s |"
    assert head in (tmp_path / "update.md").read_text()
    assert (tmp_path / "update.png").read_bytes().startswith(b"\x89PNG")


def test_in_a_gpus_precision(tmp_path, monkeypatch):
    """float32 weights under FSDP2 that compute in bfloat16."""
    monkeypatch.setattr(distributed, "compute_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(rivals.Generate, "draw", drawn := lambda self, driven: forced(self.work))
    monkeypatch.setattr(shared.Ours, "draw", drawn)
    _, rows = run(tmp_path, "update")
    assert 1e-5 < rows["released"]["error"]["gradient"] < 0.1


def forced(work):
    """Rationales of the forced lengths."""
    return [r.actions for group in work.made_up() for r in group]


def off_by_one(self, model, rows):
    """The released code's slip: the last token of what comes before belongs to y."""
    return sums(self, model, [(a[:-1], a[-1:] + b) for a, b in rows])


sums = rivals.Released.sums


@pytest.mark.parametrize("where, name, what, named", [
    (rivals.Released, "sums", off_by_one, "released is wrong: gradient is off"),
    (rivals.Released, "sums", lambda *args: -sums(*args),
     "released is wrong: gradient is off by 2"),
    (shared.Ours, "draw", lambda self, _: [z[:-1] or z for z in forced(self.work)],
     "ours is wrong: lengths is off by"),
    (shared.Ours, "draw", lambda self, _: forced(self.work), "ours is wrong: tokens is off by 6")])
def test_another_computation_is_found_out(tmp_path, monkeypatch, capsys, where, name, what, named):
    monkeypatch.setattr(where, name, what)
    code, rows = run(tmp_path, "update")
    assert code == 1 and named in capsys.readouterr().err
    assert not any("seconds" in row for row in rows.values() if row["note"])


def test_our_gradient_has_both_terms(work):
    """Without the answer term it is not the released procedure's."""
    w = work()
    truth = shared.Ours(w).gradient()
    w.args.answer_weight = 0.0
    error = loops.errors(dict(gradient=truth), shared.Ours(w))
    assert error["gradient"] > 0.01


def test_lengths(work):
    """Log-normal, some cut; both ways of sampling end where they are told to, by EOS or by L."""
    w = work(32, 16, 48, train=False)
    lengths = torch.tensor(w.lengths).float()
    assert 0.38 < lengths.median() / 48 < 0.44 and 0.03 < (lengths == 48).float().mean() < 0.1
    w = work(4, 8, 12, train=False)
    assert 12 in w.lengths and min(w.lengths) < 6
    for loop in (shared.Ours(w), rivals.Generate(w), rivals.Released(w)):
        drawn = loop()
        assert [len(z) for z in drawn] == w.lengths
        assert [z[-1] == w.eos for z in drawn] == [n < 12 for n in w.lengths]
        assert w.eos not in sum((z[:-1] for z in drawn), [])
    groups = w.groups(drawn)
    assert [r.truncated for g in groups for r in g] == [n == 12 for n in w.lengths]


def test_the_toy_is_the_toy(work):
    config = model.AutoConfig.from_pretrained(TOY)
    assert all(getattr(config, k) == v for k, v in shared.SHAPES["toy"].items())


def test_bytes_are_those_of_each_step(work):
    w = work(train=False)
    weights = sum(p.numel() for p in w.policy.parameters())
    a_token = 2 * 4 * 32 * 3  # keys and values: heads, width, layers
    prompts = [len(e.x) for e in w.batch for _ in range(3)]
    numbers = 0
    for t in range(1, max(w.lengths)):  # the first token comes of the prompt's own pass
        numbers += weights + sum(a_token * (x + t) for x, n in zip(prompts, w.lengths) if t < n)
    assert w.bytes() == 4 * numbers


def seen(layout):
    """How many tokens a token sees, in all: itself and those before it, padding aside."""
    real = layout.perm < len(layout.inverse) - 1
    (B, _, P, _), L = layout.prompt_mask.shape, layout.branch_mask.shape[2]
    prompt, branch = real[:B * P].view(B, P), real[B * P:].view(-1, L)
    return int((layout.prompt_mask[:, 0] * prompt[:, :, None]).sum()
               + (layout.branch_mask[:, 0] * branch[:, :, None]).sum())


def test_flops_are_those_of_the_tree(work):
    w, D, mlp, V = work(), 128, 384, 163
    block = 4 * D * D + 3 * D * mlp + 2 * D
    by_hand = 0
    for e, group in zip(w.batch, w.made_up()):
        tree = latro.pack_tree([e.x], [group], 1.0, w.policy)
        real = tree.ids.numel() - 1  # the last one is padding
        by_hand += 3 * (2 * block * real + 4 * D * seen(tree.layout))
        by_hand += 2 * V * D * len(tree.targets)
    assert w.flops() == by_hand


@pytest.mark.parametrize("dtype, reference", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_what_is_kept(work, monkeypatch, dtype, reference):
    """The policy in float32, its reference, and after a step Adam's two moments and step counts."""
    monkeypatch.setattr(distributed, "compute_dtype", lambda device: dtype)
    w = work()
    loop, n = shared.Ours(w), sum(p.numel() for p in w.policy.parameters())
    assert loop.kept() == (4 + reference) * n
    loop()
    assert loop.kept() == (12 + reference) * n + 4 * len([*w.policy.parameters()])


def test_a_phase_within_another(monkeypatch):
    """Its seconds are its own."""
    clock = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr(shared, "perf_counter", lambda: next(clock))
    loop = shared.Loop(None)
    with loop.phase("step"):
        with loop.phase("sample"):
            pass
    assert loop.seconds == dict(sample=2.0, score=0.0, backward=0.0, step=5.0)


class Trainer:
    """The parts of TRL's RLOOTrainer that are used, and nothing learnt."""

    def __init__(self, model, reward, args, processing_class, train_dataset):
        self.model, self.reward, self.args, self.tokenizer = model, reward, args, processing_class
        self.ref_model, self.optimizer = model, torch.optim.AdamW(model.parameters(), lr=0.0)
        self.accelerator = SimpleNamespace(clip_grad_norm_=torch.nn.utils.clip_grad_norm_)
        self.rows = [row for row in train_dataset for _ in range(args.num_generations)]

    def remove_callback(self, callback):
        pass

    def train(self):
        self.training_step(self.model, self.rows, None)

    def training_step(self, model, rows, num_items_in_batch):
        self._prepare_inputs(rows)

    def _prepare_inputs(self, rows):
        ids = self.tokenizer([row["prompt"] for row in rows], padding=True, padding_side="left",
                             return_tensors="pt", return_token_type_ids=False)
        out = self.model.generate(**ids, max_new_tokens=self.args.max_completion_length,
                                  do_sample=True, eos_token_id=self.tokenizer.eos_token_id)
        drawn = [z[:z.index(162) + 1] if 162 in z else z
                 for z in out[:, ids["input_ids"].shape[1]:].tolist()]
        assert len(self.reward(completion_ids=drawn, prompts=rows)) == len(rows)


@pytest.mark.parametrize("real", [False, True])
def test_trl(tmp_path, monkeypatch, real):
    """Its rationales are ours token by token where both draw by the same numbers: it was given the
    same prompts, weights and lengths."""
    if real and not find_spec("trl"):
        pytest.skip("not installed: trl")
    if not real:
        stub = ModuleType("trl")
        stub.RLOOConfig, stub.RLOOTrainer = SimpleNamespace, Trainer
        monkeypatch.setitem(sys.modules, "trl", stub)
    monkeypatch.setattr(loops, "find_spec", lambda name: True)
    code, rows = run(tmp_path, "update", "--only", "ours", "trl")
    assert code == 0 and rows["trl"]["error"] == dict(lengths=0, tokens=0)
    phases = rows["trl"]["phases"]
    assert phases["sample"] > phases["step"] > 0 and min(phases.values()) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["rollout", "update"])
def test_on_a_gpu(tmp_path, name):
    """The peak holds the models, and what a GPU's datasheet says is a column too."""
    code, rows = run(tmp_path, name, "--models", "toy")
    assert code == 0
    weights = 600_000 * (18 if name == "update" else 2)
    assert rows["ours"]["figures"]["peak GB"] > weights / 1e9
    assert ("MFU of 989 TFLOP/s" in rows["ours"]["figures"]) == (name == "update")


@pytest.mark.parametrize("argv, named", [
    ("update --K 1", "--K 1"), ("rollout --K 0", "0"), ("rollout --models Phi-3.5-mini", "Phi"),
    ("update --only nope --questions 1 --K 2 --L 2", "nope")])
def test_bad_input(tmp_path, capsys, monkeypatch, argv, named):
    monkeypatch.chdir(tmp_path)
    assert command.main(argv.split()) == 1
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1 and named in said.err
    assert not dist.is_initialized()
