"""Proves that the candidates of the loop benchmark do the same work, that its byte and FLOP counts
are right, and that it detects a candidate which does something else. At a toy's size on a CPU."""

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
from benchmarks import work as workloads
from pretended_cuda import Tape

SMALL = "--questions 2 --K 3 --L 12 --rounds 2".split()


@pytest.fixture(autouse=True)
def without_trl_and_compiler(monkeypatch):
    """TRL is found only if a test provides it. torch.compile would take most of the time."""
    monkeypatch.setattr(loops, "find_spec", lambda name: name != "trl" and find_spec(name))
    monkeypatch.setattr(loops, "compiler_problem", lambda: "not run: a test")


def run(out, *argv):
    """Exit code, and the rows by candidate."""
    code = command.main([*argv, *SMALL, "--out", str(out)])
    results = json.loads((out / f"{argv[0]}.json").read_text())
    return code, {row["candidate"]: row for row in results["rows"]}


@pytest.fixture
def make_workload():
    """Makes a model and questions, for training by default."""
    def make(B=2, K=3, L=12, train=True):
        return workloads.Workload("toy", SimpleNamespace(questions=B, K=K, L=L), train)
    distributed.init_distributed()
    yield make
    dist.destroy_process_group()


def test_rollout(tmp_path):
    code, rows = run(tmp_path, "rollout", "--plot")
    assert code == 0 and rows.pop("compiled")["note"] == "not run: a test"
    assert set(rows) == {"floor", "ours", "generate", "static", "continuous", "released"}
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
    """A step by itself, and a captured one. A tape stands for the CUDA graph."""
    code, rows = run(tmp_path, "decode")
    assert code == 0 and rows["eager"]["note"].startswith("the same") and rows["ours"]["rows"] == 6
    monkeypatch.setitem(decode.PACES, "cpu", decode.Pace(3, 8, True))
    monkeypatch.setattr(decode, "capture_graph", lambda function, previous: Tape(function))
    monkeypatch.setattr(decode.CUDAGraphRunner, "latest", None)
    code, rows = run(tmp_path, "decode")
    assert code == 0 and rows["ours"]["error"] == dict(logits=0) == rows["eager"]["error"]
    assert 0 < rows["ours"]["fraction"]["step"]


def test_update(tmp_path):
    code, rows = run(tmp_path, "update", "--plot")
    assert code == 0 and rows["trl"]["note"] == "not installed"
    floor = rows["floor"]["phases"]
    for name in ("ours", "released"):
        phases, figures = rows[name]["phases"], rows[name]["figures"]
        assert list(phases) == ["sample", "score", "backward", "step"] and min(phases.values()) > 0
        assert sum(phases.values()) == pytest.approx(rows[name]["seconds"]["update"]["median"], 0.2)
        learning = phases["score"] + phases["backward"]
        assert figures["MFU"] == (floor["score"] + floor["backward"]) / learning
        assert figures["of decode limit"] == floor["sample"] / phases["sample"]
        assert rows[name]["error"]["lengths"] == rows[name]["error"]["tokens"] == 0
    assert rows["released"]["error"]["gradient"] < 1e-4
    assert set(rows["floor"]["figures"]) == {"GB/s", "TFLOP/s"}
    head = "| sample / score / backward / step, s |"
    assert head in (tmp_path / "update.md").read_text()
    assert (tmp_path / "update.png").read_bytes().startswith(b"\x89PNG")


def test_out_of_memory_in_a_rollout_does_not_harm_the_next_candidate(make_workload, monkeypatch):
    """The benchmark goes on after it. Weights are sharded again, and FSDP sees the next passes."""
    monkeypatch.setattr(distributed, "compute_dtype", lambda device: torch.bfloat16)
    ours = workloads.Ours(make_workload())
    expected = ours.gradient_to_compare()
    with pytest.raises(torch.OutOfMemoryError), distributed.unsharded(ours.work.policy):
        raise torch.OutOfMemoryError
    assert {p.dtype for p in ours.work.policy.parameters()} == {torch.float32}
    for found, wanted in zip(ours.gradient_to_compare(), expected, strict=True):
        assert found.dtype == torch.float32 and torch.equal(found, wanted)


def forced_ids(work):
    """Random rationales of the forced lengths, as rows of ids."""
    return [r.actions for group in work.random_rationales() for r in group]


def test_update_in_bfloat16(tmp_path, monkeypatch):
    """As on a GPU: float32 weights under FSDP2 that compute in bfloat16."""
    def sample(self, use_uniform):
        return forced_ids(self.work)
    monkeypatch.setattr(distributed, "compute_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(rivals.Generate, "sample", sample)
    monkeypatch.setattr(workloads.Ours, "sample", sample)
    _, rows = run(tmp_path, "update")
    assert 1e-5 < rows["released"]["error"]["gradient"] < 0.1


sum_logprobs = rivals.Released.sum_logprobs


def off_by_one(self, model, rows):
    """The released code's error: the last token before y is scored as part of y."""
    return sum_logprobs(self, model, [(a[:-1], a[-1:] + b) for a, b in rows])


def wrong_sign(self, model, rows):
    return -sum_logprobs(self, model, rows)


def too_short(self, use_uniform):
    return [ids[:-1] or ids for ids in forced_ids(self.work)]


def other_tokens(self, use_uniform):
    return forced_ids(self.work)


@pytest.mark.parametrize("loop, method, mutant, message", [
    (rivals.Released, "sum_logprobs", off_by_one, "released is wrong: gradient is off"),
    (rivals.Released, "sum_logprobs", wrong_sign, "released is wrong: gradient is off by 2"),
    (workloads.Ours, "sample", too_short, "ours is wrong: lengths is off by"),
    (workloads.Ours, "sample", other_tokens, "ours is wrong: tokens is off by 6")])
def test_another_computation_is_detected(tmp_path, monkeypatch, capsys, loop, method, mutant,
                                         message):
    monkeypatch.setattr(loop, method, mutant)
    code, rows = run(tmp_path, "update")
    assert code == 1 and message in capsys.readouterr().err
    assert not any("seconds" in row for row in rows.values() if row["note"])


def test_our_gradient_has_both_terms(make_workload):
    """Without the answer term it differs from the gradient that is compared."""
    work = make_workload()
    exact = workloads.Ours(work).gradient_to_compare()
    work.args.answer_weight = 0.0
    error = loops.loop_errors(dict(gradient=exact), workloads.Ours(work))
    assert error["gradient"] > 0.01


def test_lengths(make_workload):
    """Log-normal, some of them cut. Every way of sampling ends each rationale at its length, by EOS
    or by L."""
    work = make_workload(32, 16, 48, train=False)
    lengths = torch.tensor(work.lengths).float()
    assert 0.38 < lengths.median() / 48 < 0.44 and 0.03 < (lengths == 48).float().mean() < 0.1
    work = make_workload(4, 8, 12, train=False)
    assert 12 in work.lengths and min(work.lengths) < 6
    for loop in (workloads.Ours(work), rivals.Generate(work), rivals.Continuous(work),
                 rivals.Released(work)):
        rows = loop()
        assert [len(ids) for ids in rows] == work.lengths
        assert [ids[-1] == work.eos for ids in rows] == [n < 12 for n in work.lengths]
        assert not any(work.eos in ids[:-1] for ids in rows)
    groups = work.finish(rows)
    assert [r.truncated for group in groups for r in group] == [n == 12 for n in work.lengths]


def test_the_toy_has_the_shape_of_the_toy_model():
    config = model.AutoConfig.from_pretrained(TOY)
    assert all(getattr(config, k) == v for k, v in workloads.SHAPES["toy"].items())


def test_bytes_to_decode_are_summed_over_steps(make_workload):
    work = make_workload(train=False)
    weights = sum(p.numel() for p in work.policy.parameters())
    per_token = 2 * 4 * 32 * 3  # keys and values: heads, width, layers
    prompts = [len(example.x) for example in work.batch for _ in range(3)]
    numbers = 0
    for t in range(1, max(work.lengths)):  # the prefill gives the first token
        running = [x for x, n in zip(prompts, work.lengths) if t < n]
        numbers += weights + sum(per_token * (x + t) for x in running)
    assert work.bytes_to_decode() == 4 * numbers


def attended_pairs(layout):
    """The number of pairs of a token and a token that it attends to, padding not counted."""
    real = layout.perm < len(layout.inverse) - 1
    (B, _, P, _), L = layout.prompt_masks[None].shape, layout.branch_masks[None].shape[2]
    prompt, branch = real[:B * P].view(B, P), real[B * P:].view(-1, L)
    return int((layout.prompt_masks[None][:, 0] * prompt[:, :, None]).sum()
               + (layout.branch_masks[None][:, 0] * branch[:, :, None]).sum())


def test_forward_flops_are_those_of_the_tree(make_workload):
    work, D, mlp, V = make_workload(), 128, 384, 163
    block = 4 * D * D + 3 * D * mlp + 2 * D
    by_hand = 0
    for example, group in zip(work.batch, work.random_rationales()):
        tree = latro.pack_tree([example.x], [group], 1.0, work.policy)
        tokens = tree.ids.numel() - 1  # the last one is padding
        by_hand += 3 * (2 * block * tokens + 4 * D * attended_pairs(tree.layout))
        by_hand += 2 * V * D * len(tree.targets)
    assert work.forward_flops() == by_hand


@pytest.mark.parametrize("dtype, reference", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_resident_bytes(make_workload, monkeypatch, dtype, reference):
    """The policy in float32 and its reference; after a step also Adam's two moments and its step
    counts."""
    monkeypatch.setattr(distributed, "compute_dtype", lambda device: dtype)
    work = make_workload()
    loop, n = workloads.Ours(work), sum(p.numel() for p in work.policy.parameters())
    assert loop.resident_bytes() == (4 + reference) * n
    loop()
    assert loop.resident_bytes() == (12 + reference) * n + 4 * len([*work.policy.parameters()])


def test_the_time_of_an_inner_phase_counts_once(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr(workloads, "perf_counter", lambda: next(clock))
    loop = workloads.Loop(None)
    with loop.phase("step"):
        with loop.phase("sample"):
            pass
    assert loop.seconds == dict(sample=2.0, score=0.0, backward=0.0, step=5.0)


class Trainer:
    """The parts of TRL's RLOOTrainer that the benchmark uses. It learns nothing."""

    def __init__(self, model, reward, args, processing_class, train_dataset):
        model = model.to("cpu" if args.use_cpu else "cuda")
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
        eos = self.tokenizer.eos_token_id
        ids = self.tokenizer([row["prompt"] for row in rows], padding=True, padding_side="left",
                             return_tensors="pt", return_token_type_ids=False)
        limit = self.args.max_completion_length
        out = self.model.generate(**ids.to(self.model.device), max_new_tokens=limit, do_sample=True,
                                  eos_token_id=eos)
        completions = [z[:z.index(eos) + 1] if eos in z else z
                       for z in out[:, ids["input_ids"].shape[1]:].tolist()]
        assert len(self.reward(completion_ids=completions, prompts=rows)) == len(rows)


def stub_of_trl():
    stub = ModuleType("trl")
    stub.RLOOConfig, stub.RLOOTrainer = SimpleNamespace, Trainer
    return stub


@pytest.mark.parametrize("real", [False, True])
def test_trl(tmp_path, monkeypatch, real):
    """Its rationales equal ours token by token when both draw by the same numbers. So it has the
    same prompts, weights and lengths."""
    if real and not find_spec("trl"):
        pytest.skip("not installed: trl")
    if not real:
        monkeypatch.setitem(sys.modules, "trl", stub_of_trl())
    monkeypatch.setattr(loops, "find_spec", lambda name: True)
    code, rows = run(tmp_path, "update", "--only", "ours", "trl")
    assert code == 0 and rows["trl"]["error"] == dict(lengths=0, tokens=0)
    phases = rows["trl"]["phases"]
    assert phases["sample"] > phases["step"] > 0 and min(phases.values()) > 0


@pytest.mark.gpu
def test_decode_on_a_gpu(tmp_path):
    """A captured step gives the logits of one that is launched operation by operation."""
    code, rows = run(tmp_path, "decode", "--models", "toy")
    assert code == 0 and {"floor", "ours", "eager"} == {*rows}
    assert rows["ours"]["error"] == dict(logits=0) and "seconds" in rows["eager"]


@pytest.mark.gpu
def test_trl_on_a_gpu(tmp_path, monkeypatch):
    """Its peak includes its own model and optimizer, by a stub of TRL."""
    monkeypatch.setitem(sys.modules, "trl", stub_of_trl())
    monkeypatch.setattr(loops, "find_spec", lambda name: True)
    code, rows = run(tmp_path, "update", "--models", "toy", "--only", "ours", "trl")
    assert code == 0 and rows["trl"]["error"] == dict(lengths=0)
    assert rows["trl"]["figures"]["peak GB"] > 600_000 * 8 / 1e9


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["rollout", "update"])
def test_on_a_gpu(tmp_path, name):
    """The peak includes the models. MFU by the GPU's datasheet is a column too."""
    code, rows = run(tmp_path, name, "--models", "toy")
    assert code == 0
    weights = 600_000 * (18 if name == "update" else 2)
    assert rows["ours"]["figures"]["peak GB"] > weights / 1e9
    assert ("MFU of 989 TFLOP/s" in rows["ours"]["figures"]) == (name == "update")


@pytest.mark.parametrize("argv, message", [
    ("update --K 1", "--K 1"), ("rollout --K 0", "0"), ("rollout --models Phi-3.5-mini", "Phi"),
    ("update --only nope --questions 1 --K 2 --L 2", "nope")])
def test_bad_input(tmp_path, capsys, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    assert command.main(argv.split()) == 1
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and message in err
    assert not dist.is_initialized()
