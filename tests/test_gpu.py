"""What only a CUDA device can show: the Triton kernels at real sizes in bfloat16, and the same job
as on a CPU in bfloat16 under FSDP2 and NCCL. Nothing here runs without a GPU."""

import math

import pytest
import torch
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import kernels
import latro
from conftest import ROOT, TINY, TOY, begin, launch, rows, start
from harness import data, memory
from kernels import attention, decode, reference

pytestmark = pytest.mark.gpu
SHAPES = {"8B": (2048, 4096, 128256), "135M": (4096, 576, 49152), "0.5B": (1000, 896, 151936),
          "odd": (777, 1023, 32063), "toy": (300, 64, 512)}  # T, D, V


@pytest.fixture(autouse=True)
def exact_products():
    """float32 products are float32, not TF32, whatever ran before."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield kernels.use("auto")
    torch.set_float32_matmul_precision(before)


def operands(T, D, V, dtype=torch.bfloat16):
    """h, W, targets and an upstream gradient of either sign: a model's logits, of which every
    second row is confident of its target and every fourth is ignored."""
    g = torch.Generator("cuda").manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=g, device="cuda")
    W, targets = draw(V, D) / D**0.5, torch.randint(V, (T,), generator=g, device="cuda")
    h = 2 * draw(T, D)
    h[::2] += 20 * W[targets[::2]]
    targets[::4] = -100
    return h.to(dtype).requires_grad_(), W.to(dtype).requires_grad_(), targets, draw(T)


def in_one_piece(h, W, targets, temperature):
    """Plain torch, with logits in the operands' dtype."""
    logp = (linear(h, W).float() / temperature).log_softmax(-1)
    return logp.gather(-1, targets.clamp(min=0)[:, None])[:, 0].masked_fill(targets == -100, 0.0)


def results(function, h, W, targets, upstream, temperature=1.0):
    """Log-probs, dH and dW."""
    logp = function(h, W, targets, temperature)
    return [logp.detach(), *torch.autograd.grad((upstream * logp).sum(), (h, W))]


def distance(found, right):
    return (found.double() - right.double()).norm().item() / right.double().norm().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_token_logprobs(shape, dtype):
    """No further from the definition in float32 than plain torch in this dtype is, and bit-equal
    from run to run. The slack: rounding dZ once to 8 bits for bfloat16, 11 for float16; in
    float32, sums of thousands of terms in another order."""
    given = operands(*shape, dtype)
    found = results(kernels.token_logprobs, *given, 0.9)
    for a, b in zip(found, results(kernels.token_logprobs, *given, 0.9)):
        assert torch.equal(a, b)
    wide = [x.detach().float().requires_grad_() for x in given[:2]]
    right = results(reference.token_logprobs.__wrapped__, *wide, *given[2:], 0.9)
    plain = results(in_one_piece, *given, 0.9)
    slack = [1e-5, *2 * [max(1e-5, torch.finfo(dtype).eps)]]
    for a, b, c, e in zip(found, right, plain, slack):
        assert distance(a, b) <= distance(c, b) + e


def test_token_logprobs_compiled():
    given = operands(512, 256, 4000)
    compiled = torch.compile(kernels.token_logprobs, fullgraph=True)
    for a, b in zip(results(compiled, *given, 0.7), results(kernels.token_logprobs, *given, 0.7)):
        assert torch.equal(a, b)


def test_memory():
    """T = 16384, V = 128256: at most 0.1 GB on the way there, 0.6 GB beyond dH and dW back."""
    h, W, targets, upstream = operands(16384, 4096, 128256)
    results(kernels.token_logprobs, h, W, targets, upstream)  # what libraries keep is no part of it
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logp = kernels.token_logprobs(h, W, targets)
    assert torch.cuda.max_memory_allocated() - before < 0.1e9
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(logp, (h, W), upstream)
    assert torch.cuda.max_memory_allocated() - before - 2 * (h.numel() + W.numel()) < 0.6e9


@pytest.mark.parametrize("bound", ["elbo", "iwae"])
@pytest.mark.parametrize("B, K, L", [(48, 16, 500), (70_000, 2, 9), (1, 100, 40), (2, 3, 30_000)])
def test_score_rationales(B, K, L, bound):
    """As the definition in float64, without the host waiting for the device."""
    g = torch.Generator().manual_seed(L)
    lengths = torch.randint(L + 1, (B * K, 2), generator=g)
    ends = lengths.flatten().cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]]).view(-1, 2)
    logp, logp0 = -torch.rand(2, int(ends[-1]), generator=g)
    spans = starts[:, 0], starts[:, 1], ends[1::2]
    given = [x.cuda() for x in (logp, logp0, *spans)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = kernels.score_rationales(*given, K, 0.05, bound=bound, answer_weight=0.3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    right = latro.score_rationales.__wrapped__(
        logp.double(), logp0.double(), *spans, K, 0.05, bound=bound, answer_weight=0.3)
    for a, b in zip(found, right):
        assert (a.cpu() - b).abs().max() <= 1e-5 * b.abs().max()


def test_same_curve(tmp_path):
    """Triton and torch train alike: bfloat16 rounds dZ once more, and a few updates hardly tell."""
    curves = [rows(start(*TINY, "--steps", 3, "--kernels", name, out=tmp_path / name))
              for name in ("triton", "torch")]
    assert curves[0][0]["logp_y"] == pytest.approx(curves[1][0]["logp_y"], abs=1e-3)
    for a, b in zip(*curves):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.05)


def test_toy_trains(tmp_path):
    """KL is exactly 0 at first: policy and reference differ in dtype, but both compute in bf16."""
    out = start(*TINY, "--steps", 4, "--checkpointing", out=tmp_path / "out")
    metrics = rows(out)
    assert metrics[0]["kl"] == 0.0 and all(math.isfinite(row["elbo"]) for row in metrics)
    AutoModelForCausalLM.from_pretrained(out)


def test_resume(tmp_path):
    """From the middle on, the run that was stopped is the run that was not, within bf16's noise."""
    whole = rows(start(*TINY, "--steps", 4, "--save-every", 2, out=tmp_path / "whole"))
    out = start(*TINY, "--steps", 4, "--save-every", 2, out=tmp_path / "out", stop=2)
    resumed = rows(start("--resume", out=out))
    assert [r["step"] for r in resumed] == [r["step"] for r in whole]
    assert abs(resumed[2]["logp_y"] - whole[2]["logp_y"]) < 0.1


def test_from_the_shell(tmp_path):
    code, printed, errors = launch(*TINY, "--steps", 1, "--out", tmp_path / "out")
    assert code == 0, errors
    assert "held-out questions" in printed


@pytest.fixture
def policy():
    """A model that rambles, in bfloat16; its toy-sized logits are far from uniform."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=1000, hidden_size=256, intermediate_size=512, eos_token_id=1,
                         num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2,
                         max_position_embeddings=2048, initializer_range=0.1)
    return attention.patch_model(LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval())


def drawn(policy, K=16, L=300):
    """Rows of three prompts that end all over the place: at any of thirty tokens."""
    uniform = torch.rand(3 * K, L, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    prompts = [[*range(5, 5 + n)] for n in (90, 40, 7)]
    return latro.sample_rationales(policy, prompts, [], [*range(8)], K, L, uniform)


def test_recorded_samples(policy, monkeypatch):
    """As CUDA graphs and without: the same, to the last token."""
    made, capture_graph = [], decode.capture_graph

    def spy(*args):
        made.append(capture_graph(*args))
        return made[-1]
    monkeypatch.setattr(decode, "capture_graph", spy)
    recorded = drawn(policy)
    assert 3 < len(made) < 15 and len({len(ids) for ids, *_ in recorded}) > 20
    monkeypatch.setitem(decode.PACES, "cuda", decode.PACES["cuda"]._replace(cuda_graphs=False))
    assert drawn(policy) == recorded


def test_the_host_does_not_wait_for_a_step(policy, monkeypatch):
    """Neither recorded, nor step by step."""
    def unwaited(self, shape, call=decode.CUDAGraphRunner.__call__):
        torch.cuda.set_sync_debug_mode("error")
        try:
            call(self, shape)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    monkeypatch.setattr(decode.CUDAGraphRunner, "__call__", unwaited)
    drawn(policy)
    monkeypatch.setattr(decode.CUDAGraphRunner, "__call__",
                        lambda self, _: unwaited(self, _, lambda self, _: self.function()))
    drawn(policy)


def test_rollouts_share_their_memory(policy):
    """What two of them have taken is enough for ten."""
    for _ in range(2):
        drawn(policy)
    taken = torch.cuda.memory_reserved()
    for _ in range(8):
        drawn(policy)
    assert torch.cuda.memory_reserved() <= 1.05 * taken


CRAMPED = """import sys, torch
sys.path.insert(0, sys.argv[1])
import latro
torch.cuda.set_per_process_memory_fraction(1e9 / torch.cuda.get_device_properties(0).total_memory)
sys.exit(latro.main(sys.argv[2:]))"""


@pytest.mark.parametrize("phase, K, lower", [("sample", 20_000, "--questions"),
                                             ("score", 1200, "--micro")])
def test_out_of_memory(phase, K, lower, tmp_path):
    """Of 1 GB: a cache for 40 000 rows, or what a tree of 40 000 tokens keeps."""
    run = begin("-c", CRAMPED, ROOT, *TINY, "--K", K, "--steps", 1, "--out", tmp_path / "out")
    _, errors = run.communicate(timeout=300)
    line = errors.splitlines()[-1]
    assert run.returncode == 1 and "Traceback" not in errors
    assert f"out of GPU memory in {phase}" in line and lower in line and "GB at the peak" in line


@pytest.mark.parametrize("checkpointing", [False, True])
def test_plan(checkpointing, tmp_path):
    """The peak of a whole run, evaluation included, is that of the plan within a tenth. The model has
    168 M parameters, so what libraries allocate is little. Its rationales run until L cuts them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8,
        num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=2048, eos_token_id=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    tokenizer.save_pretrained(tmp_path)
    flags = [*TINY, *"--questions 2 --K 8 --L 400 --steps 2 --task toy --model".split(), tmp_path,
             "--checkpointing" if checkpointing else "--no-checkpointing"]
    torch.cuda.reset_peak_memory_stats()  # of the tests before
    measured = rows(start(*flags, out=tmp_path / "out"))[-1]["peak_mem_gb"]
    args = latro.parse([*map(str, flags), "--out", str(tmp_path / "new")])
    x = max(len(e.x) for e in data.load_datasets(args)[1])
    planned = memory.memory_phases(memory.Shape(config, args, 1, x))
    peak = max(sum(held.values()) for held in planned.values()) / 1e9
    assert measured == pytest.approx(peak, rel=0.1)
