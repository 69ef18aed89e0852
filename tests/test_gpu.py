"""Proves on a CUDA device what a CPU cannot show: the Triton kernels at real sizes in bfloat16, and
training in bfloat16 under FSDP2 and NCCL. Without a GPU, test_cuda_pretended.py runs every line of
this file at a toy's size."""

import json
import math

import pytest
import torch
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import kernels
import latro
from conftest import PRETENDED, ROOT, TINY, TOY, begin, launch, rows, start, stops_of
from harness import data, memory
from kernels import attention, decode, reference

pytestmark = pytest.mark.gpu
SHAPES = {"8B": (2048, 4096, 128256), "135M": (4096, 576, 49152), "0.5B": (1000, 896, 151936),
          "odd": (777, 1023, 32063), "toy": (300, 64, 512)}  # T, D, V
LARGE = 16384, 4096, 128256
LAYERS = 3
RATIONALES = [(48, 16, 500), (70_000, 2, 9), (1, 100, 40), (2, 3, 30_000)]  # B, K, L
ROLLOUTS = 8
WIDTHS = dict(vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8)
COMPILED = 512, 256, 4000
ROLLOUT_TOKENS, LONGEST, TOLERANCE = 300, 400, 0.1  # of the plan
if PRETENDED:
    SHAPES, LARGE, ROLLOUTS = {"odd": (77, 63, 463), "toy": (30, 64, 512)}, (64, 32, 600), 1
    LAYERS = 1
    RATIONALES, COMPILED = [(8, 16, 50), (3, 2, 9), (1, 100, 40), (2, 3, 300)], (77, 63, 463)
    WIDTHS = dict(vocab_size=1000, hidden_size=256, intermediate_size=704, num_hidden_layers=4)
    # A tape keeps what the memory pool of a graph uses again.
    ROLLOUT_TOKENS, LONGEST, TOLERANCE = 220, 20, 0.5


@pytest.fixture(autouse=True)
def exact_products():
    """Multiplies float32 matrices in float32, not TF32, whatever ran before."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    kernels.use("auto")
    yield
    torch.set_float32_matmul_precision(before)


# ------------------------------------------------------------------------------ kernels
def make_operands(T, D, V, dtype=torch.bfloat16):
    """hidden, weight, targets and an upstream gradient of both signs. Every second row is confident
    of its target, and every fourth row is ignored."""
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=g, device="cuda")
    weight, targets = normal(V, D) / D**0.5, torch.randint(V, (T,), generator=g, device="cuda")
    hidden = 2 * normal(T, D)
    hidden[::2] += 20 * weight[targets[::2]]
    targets[::4] = -100
    return (hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets,
            normal(T))


def plain_logprobs(hidden, weight, targets, temperature):
    """Plain torch, with all logits at once in the operands' dtype."""
    logp = (linear(hidden, weight).float() / temperature).log_softmax(-1)
    return logp.gather(-1, targets.clamp(min=0)[:, None])[:, 0].masked_fill(targets == -100, 0.0)


def values_and_gradients(function, hidden, weight, targets, upstream, temperature=1.0):
    """Log-probs, and the gradients of hidden and weight."""
    logp = function(hidden, weight, targets, temperature)
    return [logp.detach(), *torch.autograd.grad((upstream * logp).sum(), (hidden, weight))]


def relative_distance(x, exact):
    return (x.double() - exact.double()).norm().item() / exact.double().norm().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_token_logprobs(shape, dtype):
    """As close to the definition in float32 as plain torch in this dtype is, and bit-equal from run
    to run. The slack is one rounding of dZ: to 8 bits in bfloat16, to 11 in float16. In float32 it
    is the rounding of sums of thousands of terms in another order."""
    operands = make_operands(*shape, dtype)
    found = values_and_gradients(kernels.token_logprobs, *operands, 0.9)
    for a, b in zip(found, values_and_gradients(kernels.token_logprobs, *operands, 0.9)):
        assert torch.equal(a, b)
    wide = [x.detach().float().requires_grad_() for x in operands[:2]]
    definition = reference.token_logprobs.__wrapped__
    exact = values_and_gradients(definition, *wide, *operands[2:], 0.9)
    plain = values_and_gradients(plain_logprobs, *operands, 0.9)
    slack = [1e-5, *2 * [max(1e-5, torch.finfo(dtype).eps)]]
    for ours, wanted, theirs, allowed in zip(found, exact, plain, slack):
        assert relative_distance(ours, wanted) <= relative_distance(theirs, wanted) + allowed


def test_token_logprobs_under_torch_compile():
    operands = make_operands(*COMPILED)
    compiled = torch.compile(kernels.token_logprobs, fullgraph=True)
    for a, b in zip(values_and_gradients(compiled, *operands, 0.7),
                    values_and_gradients(kernels.token_logprobs, *operands, 0.7)):
        assert torch.equal(a, b)


def test_memory_of_token_logprobs():
    """At T = 16384, V = 128256 the forward pass takes at most 0.1 GB, and the backward pass 0.6 GB
    beyond dH and dW."""
    hidden, weight, targets, upstream = make_operands(*LARGE)
    values_and_gradients(kernels.token_logprobs, hidden, weight, targets, upstream)  # workspaces
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logp = kernels.token_logprobs(hidden, weight, targets)
    assert torch.cuda.max_memory_allocated() - before < 0.1e9
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(logp, (hidden, weight), upstream)
    gradients = 2 * (hidden.numel() + weight.numel())
    assert torch.cuda.max_memory_allocated() - before - gradients < 0.6e9


@pytest.mark.parametrize("options", [
    dict(bound="elbo"), dict(bound="iwae"), dict(reward="prob"), dict(reward="mean-prob"),
    dict(reward="correct")], ids=lambda options: [*options.values()][0])
@pytest.mark.parametrize("B, K, L", RATIONALES)
def test_score_rationales(B, K, L, options):
    """Equals the definition in float64. The host does not wait for the device."""
    g = torch.Generator().manual_seed(L)
    lengths = torch.randint(L + 1, (B * K, 2), generator=g)
    ends = lengths.flatten().cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]]).view(-1, 2)
    logp, logp0 = -torch.rand(2, int(ends[-1]), generator=g)
    spans = starts[:, 0], starts[:, 1], ends[1::2]
    right = torch.rand(B * K, generator=g) < 0.5
    *on_gpu, right_on_gpu = (x.cuda() for x in (logp, logp0, *spans, right))
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = kernels.score_rationales(*on_gpu, K, 0.05, answer_weight=0.3, right=right_on_gpu,
                                         **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact = latro.score_rationales.__wrapped__(
        logp.double(), logp0.double(), *spans, K, 0.05, answer_weight=0.3, right=right, **options)
    for a, b in zip(found, exact):
        assert (a.cpu() - b).abs().max() <= 1e-5 * b.abs().max()


# ------------------------------------------------------------------------------ training
def test_triton_and_torch_train_alike(tmp_path):
    """Triton rounds dZ once more, which a few updates hardly show."""
    curves = [rows(start(*TINY, "--steps", 3, "--kernels", name, out=tmp_path / name))
              for name in ("triton", "torch")]
    assert curves[0][0]["logp_y"] == pytest.approx(curves[1][0]["logp_y"], abs=1e-3)
    for a, b in zip(*curves):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.05)


def test_toy_trains(tmp_path):
    """The KL starts at exactly 0: policy and reference differ in dtype, but both compute in
    bfloat16."""
    out = start(*TINY, "--steps", 4, "--checkpointing", out=tmp_path / "out")
    metrics = rows(out)
    assert metrics[0]["kl"] == 0.0 and all(math.isfinite(row["elbo"]) for row in metrics)
    AutoModelForCausalLM.from_pretrained(out)


def test_resume(tmp_path):
    """A run that is stopped and resumed equals one that is not stopped, within bfloat16's noise."""
    whole = rows(start(*TINY, "--steps", 4, "--save-every", 2, out=tmp_path / "whole"))
    out = start(*TINY, "--steps", 4, "--save-every", 2, out=tmp_path / "out", stop=2)
    resumed = rows(start("--resume", out=out))
    assert [r["step"] for r in resumed] == [r["step"] for r in whole]
    assert abs(resumed[2]["logp_y"] - whole[2]["logp_y"]) < 0.1


def test_from_the_shell(tmp_path):
    """latro.py trains, and eval.py grades what it has trained."""
    code, printed, errors = launch(*TINY, "--steps", 1, "--out", tmp_path / "out")
    assert code == 0, errors
    assert "held-out questions" in printed
    code, printed, errors = launch("--ckpt", tmp_path / "out", "--out", tmp_path, "--k", 2,
                                   "--questions", 2, script=ROOT / "eval.py")
    assert code == 0, errors
    results = json.loads((tmp_path / "eval.json").read_text())["results"]
    assert list(results) == ["base", "out"]


# ------------------------------------------------------------------------------ sampling
@pytest.fixture
def policy():
    """A random model in bfloat16. Its initial weights are large, so that its distributions are far
    from uniform."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=1000, hidden_size=256, intermediate_size=512, eos_token_id=1,
                         num_hidden_layers=LAYERS, num_attention_heads=8, num_key_value_heads=2,
                         max_position_embeddings=2048, initializer_range=0.1)
    return attention.patch_model(LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval())


def sample(policy, K=16, L=ROLLOUT_TOKENS):
    """K rationales for each of three prompts. Eight EOS tokens make them end at many lengths."""
    uniform = torch.rand(3 * K, L, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    prompts = [[*range(5, 5 + n)] for n in (90, 40, 7)]
    return latro.sample_rationales(policy, prompts, stops_of(policy.vocab_size), [*range(8)], K, L,
                                   uniform)


def test_captured_steps_draw_the_same_samples(policy, monkeypatch):
    """With CUDA graphs and without, the samples are the same to the last token."""
    graphs, capture_graph = [], decode.capture_graph

    def counted(*args):
        graphs.append(capture_graph(*args))
        return graphs[-1]
    monkeypatch.setattr(decode, "capture_graph", counted)
    captured = sample(policy)
    assert 3 < len(graphs) < 15 and len({len(ids) for ids, *_ in captured}) > 20
    monkeypatch.setitem(decode.PACES, "cuda", decode.PACES["cuda"]._replace(cuda_graphs=False))
    assert sample(policy) == captured


def test_the_host_does_not_wait_for_a_step(policy, monkeypatch):
    """Neither for a captured step nor for one that is launched operation by operation."""
    run_captured = decode.CUDAGraphRunner.__call__

    def run_eagerly(self, shape):
        self.function()

    for run_step in (run_captured, run_eagerly):
        def without_waiting(self, shape, run_step=run_step):
            torch.cuda.set_sync_debug_mode("error")
            try:
                run_step(self, shape)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        monkeypatch.setattr(decode.CUDAGraphRunner, "__call__", without_waiting)
        sample(policy)


def test_rollouts_reuse_memory(policy):
    """What two rollouts have reserved is enough for more."""
    for _ in range(2):
        sample(policy)
    reserved = torch.cuda.memory_reserved()
    for _ in range(ROLLOUTS):
        sample(policy)
    assert torch.cuda.memory_reserved() <= 1.05 * reserved


# ------------------------------------------------------------------------------ memory
WITH_LESS_MEMORY = """import sys, torch
sys.path.insert(0, sys.argv[1])
import latro
total = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction(float(sys.argv[2]) / total)
sys.exit(latro.main(sys.argv[3:]))"""


@pytest.mark.parametrize("phase, K, flag", [("sample", 20_000, "--questions"),
                                            ("score", 1200, "--micro")])
def test_out_of_memory(phase, K, flag, tmp_path):
    """1 GB holds neither a cache for 40 000 rows nor the activations of a tree of 40 000 tokens."""
    limit = 1e9
    if PRETENDED:
        limit, K = limit / 10, K // 10
    run = begin("-c", WITH_LESS_MEMORY, ROOT, limit, *TINY, "--K", K, "--steps", 1,
                "--out", tmp_path / "out")
    _, errors = run.communicate(timeout=300)
    line = errors.splitlines()[-1]
    assert run.returncode == 1 and "Traceback" not in errors
    assert f"out of GPU memory in {phase}" in line and flag in line and "GB at the peak" in line


@pytest.mark.parametrize("checkpointing", [False, True])
def test_plan(checkpointing, tmp_path):
    """The peak of a whole run, evaluation included, is within a tenth of the plan's. The model has
    168 M parameters, so that what libraries allocate is little in comparison. Its rationales run
    until L cuts them."""
    torch.manual_seed(0)
    config = LlamaConfig(**WIDTHS, num_attention_heads=16, num_key_value_heads=4,
                         max_position_embeddings=2048, eos_token_id=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(TOY).save_pretrained(tmp_path)
    flags = [*TINY, *"--questions 2 --K 8 --steps 2 --task toy --model".split(), tmp_path,
             "--L", LONGEST, "--checkpointing" if checkpointing else "--no-checkpointing"]
    # Earlier tests, those of the benchmarks above all, keep memory and have peaks of their own.
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() / 1e9
    measured = rows(start(*flags, out=tmp_path / "out"))[-1]["peak_mem_gb"] - before
    args = latro.parse([*map(str, flags), "--out", str(tmp_path / "new")])
    prompt_tokens = max(len(example.x) for example in data.load_datasets(args)[1])
    planned = memory.memory_phases(memory.Shape(config, args, 1, prompt_tokens))
    assert measured == pytest.approx(memory.peak_bytes(planned) / 1e9, rel=TOLERANCE)
