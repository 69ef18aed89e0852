"""Proves that tree and sampler agree with plain Hugging Face models, and how the sampler stops.

The reference is the stock model of each architecture, with its own attention and masks, over one
sequence at a time: no padding, no tree, no cache. A tree of several questions must give the same
log-probs and gradients. The sampler must continue a prompt as `generate` does, draw from the
distribution that is scored, and give a row the same tokens whatever the other rows are.
"""

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import kernels  # noqa: F401  before transformers, which looks for a package of this name
import latro
from conftest import stops_of
from harness import distributed
from kernels import attention as kernel_attention
from kernels import reference
import transformers as hf

V, EOS = 23, [7, 9]
STOPS = stops_of(V, [3], [4, 5])
CODEC = SimpleNamespace(template_at_start=[3], template_after_z=[4, 5])
SHAPE = dict(vocab_size=V, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
             bos_token_id=None, eos_token_id=None, pad_token_id=None)
LLAMA3 = dict(rope_type="llama3", rope_theta=100.0, factor=8.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=16)
LONG = dict(rope_type="longrope", rope_theta=1000.0, short_factor=[1.0, 1.5, 2.0, 3.0],
            long_factor=[2.0, 4.0, 6.0, 8.0], original_max_position_embeddings=48)
KINDS = ["sliding_attention", "full_attention"]
CONFIGS = dict(
    llama=hf.LlamaConfig(**SHAPE), llama_tied=hf.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    llama3=hf.LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    mistral=hf.MistralConfig(**SHAPE, sliding_window=None),
    mistral_window=hf.MistralConfig(**SHAPE, sliding_window=6),
    phi3=hf.Phi3Config(**SHAPE),
    phi3_long=hf.Phi3Config(**SHAPE, rope_parameters=LONG, original_max_position_embeddings=48),
    phi3_window=hf.Phi3Config(**SHAPE, sliding_window=6),
    qwen2=hf.Qwen2Config(**SHAPE), qwen2_tied=hf.Qwen2Config(**SHAPE, tie_word_embeddings=True),
    qwen2_kinds=hf.Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=6,
                               max_window_layers=1),
    qwen3=hf.Qwen3Config(**SHAPE, head_dim=12),
    gemma3=hf.Gemma3TextConfig(**SHAPE, head_dim=12, sliding_window=6, layer_types=KINDS),
    olmo2=hf.Olmo2Config(**SHAPE),
    olmo3=hf.Olmo3Config(**SHAPE, sliding_window=6, layer_types=KINDS),
    smollm3=hf.SmolLM3Config(**SHAPE, no_rope_layer_interval=2),
    granite=hf.GraniteConfig(**SHAPE, logits_scaling=3.0, embedding_multiplier=2.0,
                             residual_multiplier=0.5, attention_multiplier=0.3),
    qwen3_moe=hf.Qwen3MoeConfig(**SHAPE, head_dim=12, moe_intermediate_size=24, num_experts=4,
                                num_experts_per_tok=2),
    mixtral=hf.MixtralConfig(**SHAPE, sliding_window=6, num_local_experts=4))
EXPERTS = "qwen3_moe", "mixtral"  # whose routers round to float32 inside
PROMPTS = [[1, 8, 2], [6, 0, 1, 20, 11, 12, 2, 2, 19], [17], [10, 9, 8, 15, 3]]
each_model = pytest.mark.parametrize("name", CONFIGS)


class ExactNorm(nn.Module):
    """A norm of transformers, which would round to float32 inside."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.one = norm.weight, float("Gemma" in type(norm).__name__)
        self.eps = getattr(norm, "variance_epsilon", None) or norm.eps

    def forward(self, x):
        return nn.functional.rms_norm(x, self.weight.shape, self.one + self.weight, self.eps)


def model(name: str, attention: str = "latro", dtype=torch.float32):
    """A random model, the same for every attention. In float64 its norms are exact."""
    torch.manual_seed(1)
    m = hf.AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), dtype=dtype)
    for parent in [*m.modules()] if dtype == torch.float64 else ():
        for key, child in parent.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                setattr(parent, key, ExactNorm(child))
    for key, p in m.named_parameters():  # biases and norms too, each its own
        nn.init.normal_(p, float("norm" in key), 0.25)
    if dtype == torch.float64 and name in EXPERTS:
        m.set_experts_implementation("eager")  # the default has no float64
    if attention == "latro":
        kernel_attention.patch_model(m)
    m.set_attn_implementation(attention)
    m.logprobs = latro.logprobs.__get__(m)
    return m.eval()


def plain(m, before: list[int], tokens: list[int], temperature: float = 1.0):
    """(len(tokens), V): log-probs by a forward over this one sequence."""
    logits = m(torch.tensor([before + tokens]), use_cache=False).logits[0, len(before) - 1:-1]
    return (logits / temperature).log_softmax(-1)


def at(logp, tokens: list[int]):
    return logp[torch.arange(len(tokens)), tokens]


def one_at_a_time(m, groups, temperature: float):
    """(T,) what a tree of PROMPTS and groups must give: z's actions, y, the next z's, ..."""
    parts = []
    for x, r in ((x, r) for x, group in zip(PROMPTS, groups) for r in group):
        parts.append(at(plain(m, x, r.actions, temperature), r.actions))
        parts.append(at(plain(m, x + r.actions[:r.context], r.y), r.y))
    return torch.cat(parts)


def gradients(m, logp):
    """Of a sum in which each token has its own weight."""
    g = torch.autograd.grad((torch.linspace(-1, 2, len(logp)) * logp).sum(), [*m.parameters()])
    return torch.cat([t.flatten().double() for t in g])


# ------------------------------------------------------- the tree

DRAWS = [([EOS[0]], 1, -1), ([3], 1, 1), ([4, 5], 2, 2),  # z empty: by EOS, by the templates
         ([1, 2, 4, 5], 4, 2), ([11, 6, 21, 0, 3], 5, 1), ([2, 2, EOS[1]], 3, -1),
         ([14, 0, 13, 8, 2, 1, 1, 18, 22], 9, 0), ([0], 1, 0)]  # cut by L


def ragged(credit: str):
    """Groups of four for each prompt: every way to end z, answers of several lengths."""
    draws = itertools.cycle(DRAWS)
    shift = lambda b: [next(draws) for _ in range(3)] + [DRAWS[6 - b]]
    return [[latro.split_rollout(CODEC, *d, [12, 13, 16][:1 + (b + k) % 3], credit)
             for k, d in enumerate(shift(b))] for b in range(len(PROMPTS))]


@each_model
@pytest.mark.parametrize("credit, temperature", [("answer", 1.0), ("full", 0.75)])
@pytest.mark.parametrize("dtype, nats, relative", [
    (torch.float32, 1e-5, 1e-5), (torch.float64, 1e-12, 1e-12)], ids=["float32", "float64"])
def test_tree_is_one_sequence_at_a_time(name, credit, temperature, dtype, nats, relative):
    policy, stock, groups = model(name, dtype=dtype), model(name, "sdpa", dtype), ragged(credit)
    logp = policy.logprobs(latro.pack_tree(PROMPTS, groups, temperature, policy))
    wanted = one_at_a_time(stock, groups, temperature)
    off = float((logp - wanted).detach().abs().max())
    g, truth = gradients(policy, logp), gradients(stock, wanted)
    wrong = float((g - truth).norm() / truth.norm())
    print(f"{name} {dtype}: {off:.1e} nats, gradient {wrong:.1e}")
    if name in EXPERTS:
        nats = relative = 1e-5
    assert off < nats and wrong < relative


@pytest.mark.parametrize("name", ["mistral_window", "phi3_window"])
def test_the_window_matters(name):
    """Were the window one token wider, the tests here would see it."""
    narrow, wide = model(name, "sdpa"), model(name, "sdpa")
    wide.config.sliding_window = 7
    a, b = (one_at_a_time(m, ragged("answer"), 1.0) for m in (narrow, wide))
    assert (a - b).abs().max() > 1e-2


def test_a_tree_written_out():
    """Two prompts; z ended by the template, by EOS and by L; padding; every row of the masks."""
    policy = SimpleNamespace(device=torch.device("cpu"), config=SimpleNamespace(sliding_window=3))

    def rationale(draw, y):
        return latro.split_rollout(CODEC, *draw, y, "answer")
    groups = [[rationale(([1, 3], 2, 1), [12]), rationale(([2, 7], 2, -1), [13, 14])],
              [rationale(([6], 1, 0), [12]), rationale(([7], 1, -1), [12])]]
    tree = latro.pack_tree([[20, 21], [22]], groups, 0.5, policy)
    assert tree.ids.tolist() == [[20, 21, 1, 3, 2, 4, 5, 13, 22, 6, 4, 5, 3, 0]]
    assert tree.position.tolist() == [[0, 1, 2, 3, 2, 3, 4, 5, 0, 1, 2, 3, 1, 0]]
    assert tree.targets.tolist() == [1, 3, 12, 2, 7, 4, 5, 13, 14, 6, 4, 5, 12, 7, 3, 12]
    assert tree.sources.tolist() == [1, 2, 3, 1, 4, 4, 5, 6, 7, 8, 9, 10, 11, 8, 8, 12]
    assert tree.temperature.tolist() == [.5, .5, 1, .5, .5, 1, 1, 1, 1, .5, 1, 1, 1, .5, 1, 1]
    assert [t.tolist() for t in tree.spans] == [[0, 3, 9, 13], [2, 5, 10, 14], [3, 9, 13, 16]]
    perm, inverse, prompt_masks, branch_masks = tree.layout
    prompt_mask, branch_mask = prompt_masks[3], branch_masks[3]
    rows = [[0, 1, 13], [8, 13, 13],  # prompts; a slot to spare holds token 13
            [2, 3, 13, 13, 13], [4, 5, 6, 7, 13], [9, 10, 11, 13, 13], [12, 13, 13, 13, 13]]
    assert perm.tolist() == sum(rows, [])
    assert [perm[i] for i in inverse] == [*range(14)]

    def written(mask):
        return [["".join(map(str, q)) for q in b] for b in mask[:, 0].int().tolist()]
    assert written(prompt_mask) == [["100", "110", "001"], ["100", "011", "011"]]
    assert written(branch_mask)[:2] == [["11010000", "01011000", *["00100111"] * 3],
                                     ["11010000", "01011000", "00011100", "00001110", "00100001"]]
    assert written(branch_mask)[2][:3] == ["10010000", "10011000", "00011100"]


def test_tree_attention_equals_attention_with_a_full_mask():
    """Values and gradients of an S x S mask in float64; token S - 1, the padding, has no effect and
    no gradient."""
    torch.manual_seed(0)
    trunks, branches, S, d = [(0, 3), (12, 1)], [(3, 4), (7, 5), (13, 1), (14, 6)], 21, 6
    branch = torch.tensor([0] * 3 + [1] * 4 + [2] * 5 + [3] + [4] + [5] * 6 + [6])
    tree = torch.tensor([0] * 12 + [1] * 8 + [2])
    position = [*range(3), *range(3, 7), *range(3, 8), 0, 1, *range(1, 7)]
    place = torch.tensor(position + [0])
    policy = SimpleNamespace(device=torch.device("cpu"), config=SimpleNamespace(sliding_window=4))
    layout = kernel_attention.build_layout(trunks, branches, position, policy)
    trunk = (branch == 0) | (branch == 3)
    related = (branch == branch[:, None]) | trunk & (tree == tree[:, None])
    ahead = place[:, None] - place
    mask = related & (ahead >= 0) & (ahead < 4) & (torch.arange(S)[:, None] >= torch.arange(S))
    q, k, v = (torch.randn(1, heads, S, d, dtype=torch.float64, requires_grad=True)
               for heads in (6, 2, 2))
    upstream = torch.randn(1, S, 6, d, dtype=torch.float64)
    upstream[:, -1] = 0  # it is not scored
    wide = [t.repeat_interleave(3, 1) for t in (k, v)]
    wanted = nn.functional.scaled_dot_product_attention(q, *wide, mask[None, None], scale=0.3)
    shared = SimpleNamespace(num_attention_heads=6, num_key_value_heads=2)
    found, _ = kernel_attention.attention(None, q, k, v, None, 0.3, sliding_window=4,
                                          layout=layout.additive(q, shared))
    assert (found - wanted.transpose(1, 2))[:, :-1].abs().max() < 1e-14
    for a, b in zip(torch.autograd.grad((found * upstream).sum(), (q, k, v)), torch.autograd.grad(
            (wanted.transpose(1, 2) * upstream).sum(), (q, k, v))):
        assert (a - b).abs().max() < 1e-14 and (a[:, :, -1] == 0).all()


@pytest.mark.parametrize("sizes, budget, passes", [
    ([3, 3, 2, 4, 5, 2], 6, [[0, 1], [2, 3], [4], [5]]), ([7, 2, 4], 6, [[0], [1, 2]]),
    ([1, 1], 1, [[0], [1]]), ([1, 1], 9, [[0, 1]]), ([], 9, [])])
def test_make_micro_batches(sizes, budget, passes):
    assert distributed.make_micro_batches(sizes, budget) == passes


def test_sizes_are_rounded_up(monkeypatch):
    """As on a GPU: more slots, more padding tokens, the same numbers."""
    policy, groups = model("mistral_window", dtype=torch.float64), ragged("answer")
    sizes, values = [], []
    for multiple in (1, 8):
        monkeypatch.setitem(kernel_attention.PAD_MULTIPLE, "cpu", multiple)
        tree = latro.pack_tree(PROMPTS, groups, 1.0, policy)
        sizes.append([tree.ids.numel(), *tree.layout.prompt_masks[6].shape,
                      *tree.layout.branch_masks[6].shape])
        logp = policy.logprobs(tree)
        values.append((logp.detach(), gradients(policy, logp)))
    assert all(n % 8 == 0 for n in (sizes[1][i] for i in (0, 3, 4, 7, 8))) and sizes[0] != sizes[1]
    for a, b in zip(*values):
        assert (a - b).abs().max() < 1e-12


@each_model
def test_branches_and_questions_do_not_see_each_other(name):
    """Other rationales and other questions in the tree change a log-prob by rounding at most."""
    policy, groups = model(name, dtype=torch.float64), ragged("answer")

    def score(prompts, groups):
        return policy.logprobs(latro.pack_tree(prompts, groups, 1.0, policy)).split(
            [len(r.actions) + len(r.y) for group in groups for r in group])
    with torch.no_grad():
        together = iter(score(PROMPTS, groups))
        for x, group in zip(PROMPTS, groups):
            for r in group:
                off = (score([x], [[r]])[0] - next(together)).abs().max()
                assert off < (1e-5 if name in EXPERTS else 1e-12)


# ------------------------------------------------------- the sampler and the model

def generated(m, prompt: list[int], n: int, eos: list[int] | None) -> list[int]:
    with torch.no_grad():
        return m.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long(),
                          max_new_tokens=n, do_sample=False, eos_token_id=eos,
                          pad_token_id=0)[0, len(prompt):].tolist()


def greedy(rows: int, tokens: int) -> torch.Tensor:
    return torch.full((rows, tokens), math.nan)


@each_model
def test_greedy_is_generate(name):
    """All prompts in one left-padded batch, against one at a time; with ends at EOS, some early."""
    policy, stock, n = model(name), model(name, "sdpa"), 16
    whole = [generated(stock, x, n, None) for x in PROMPTS]
    nan = greedy(len(PROMPTS), n)
    assert [ids for ids, *_ in latro.sample_rationales(policy, PROMPTS, stops_of(V), [-1], 1, n,
                                                       nan)] == whole
    # So that the first row ends at once, and others on the way or never.
    eos = [whole[0][0], next(t for t in whole[1] + whole[2] if t != whole[0][0])]
    short = [generated(stock, x, n, eos) for x in PROMPTS]
    assert len(short[0]) == 1 and len({*map(len, short)}) > 1
    ends = [(ids, len(ids), -int(ids[-1] in eos)) for ids in short]
    assert latro.sample_rationales(policy, PROMPTS, stops_of(V), eos, 1, n, nan) == ends


@pytest.fixture
def seen(monkeypatch) -> list[torch.Tensor]:
    """The logits that the sampler draws from, divided by the temperature, step by step."""
    steps, pick = [], latro.inverse_cdf_sample

    def spy(logits, uniform, temperature):
        steps.append(logits.double() / temperature)
        return pick(logits, uniform, temperature)
    monkeypatch.setattr(latro, "inverse_cdf_sample", spy)
    return steps


@each_model
@pytest.mark.parametrize("dtype, nats", [(torch.float32, 3e-5), (torch.float64, 5e-6)])
@torch.no_grad()
def test_the_sampling_distribution_is_the_one_scored(name, dtype, nats, seen):
    """Every distribution that the sampler draws from is the stock model's, and so are the log-probs
    that the tree gives the draws. The sampler's logits are float32, so 5e-6 nats is float64's."""
    policy, stock, K, L, T = model(name, dtype=dtype), model(name, "sdpa", dtype), 3, 12, 0.75
    uniform = torch.rand(len(PROMPTS) * K, L, generator=torch.Generator().manual_seed(0))
    # No token ends a row early.
    drawn = latro.sample_rationales(policy, PROMPTS, stops_of(V), [-1], K, L, uniform, T)
    logits = torch.stack(seen, 1).view(len(PROMPTS), K, L, V)
    groups = [[latro.split_rollout(CODEC, *d, [12], "answer") for d in drawn[i:i + K]]
              for i in range(0, len(drawn), K)]
    off = max(float((plain(stock, x, r.actions, T) - steps.log_softmax(-1)).abs().max())
              for x, group, rows in zip(PROMPTS, groups, logits) for r, steps in zip(group, rows))
    tree = policy.logprobs(latro.pack_tree(PROMPTS, groups, T, policy))
    far = float((tree - one_at_a_time(stock, groups, T)).abs().max())
    print(f"{name} {dtype}: sampler {off:.1e} nats, tree {far:.1e}")
    exact = dtype == torch.float64 and name not in EXPERTS
    assert off < nats and far < (1e-12 if exact else 3e-5)


@each_model
def test_a_row_depends_on_its_own_numbers_only(name):
    """The same draw alone, with other prompts, and with more rationales."""
    policy, K, L = model(name), 6, 14
    uniform = torch.rand(len(PROMPTS), K, L, generator=torch.Generator().manual_seed(0))

    def sample(prompts, u):
        return latro.sample_rationales(policy, prompts, STOPS, EOS, u.shape[1], L, u.flatten(0, 1))
    many = sample(PROMPTS, uniform)
    assert len({end for _, end, _ in many}) > 3
    few = sample(PROMPTS[1:3], uniform[1:3, 2:4])
    assert few == many[K + 2:K + 4] + many[2 * K + 2:2 * K + 4]
    for b, x in enumerate(PROMPTS):
        for k in range(K):
            assert sample([x], uniform[b:b + 1, k:k + 1]) == [many[b * K + k]]
    # A greedy row among them changes neither them nor itself.
    mixed = uniform.clone()
    mixed[:, 2] = math.nan
    rows, alone = sample(PROMPTS, mixed), sample(PROMPTS, mixed[:, 2:3])
    assert rows[2::K] == alone and any(row != one for row, one in zip(alone, many[2::K]))
    assert [row for i, row in enumerate(rows) if i % K != 2] == [
        row for i, row in enumerate(many) if i % K != 2]


# ------------------------------------------------------- the sampler's rules, on a script

class Counting(nn.Module):
    """Token t is followed by t + 1."""

    def forward(self, ids, past_key_values, **_):
        past_key_values.update(*torch.zeros(2, len(ids), 1, ids.shape[1], 1), 0)
        return SimpleNamespace(last_hidden_state=torch.eye(100)[(ids + 1) % 100])


class Script:
    """A policy that counts."""
    device, model = torch.device("cpu"), Counting()
    config = SimpleNamespace(num_attention_heads=1, num_key_value_heads=1)

    def get_output_embeddings(self):
        return SimpleNamespace(weight=torch.eye(100))


def continued(first: list[int], L: int, max_answer_tokens: int, stops, eos,
              K: int = 1) -> list[tuple]:
    """(number of ids, end, stop reason) of the continuations that begin with these tokens."""
    rows = latro.sample_rationales(Script(), [[t - 1] for t in first], stops_of(100, *stops), eos,
                                   K, L, greedy(len(first) * K, L + max_answer_tokens),
                                   max_answer_tokens=max_answer_tokens)
    for (ids, *_), t in zip(rows, (t for t in first for _ in range(K)), strict=True):
        assert ids == [*range(t, t + len(ids))]
    return [(len(ids), end, reason) for ids, end, reason in rows]


RULES = dict(stops=[[20, 21], [40]], eos=[30, 43])
WITH_ANSWER = {  # first token: its continuation with L = 5 and 4 tokens for the answer
    20: (6, 2, 2),  # 20 21: a template at once, then an answer of all 4 tokens
    17: (9, 5, 2),  # ... 20 21: a template at L is in time
    16: (5, 5, 0),  # ... 20: half a template at L is not; no answer after a z that L cut
    21: (5, 5, 0),  # nor is a template begun by the prompt, here 20
    40: (4, 1, 1), 39: (5, 2, 1), 37: (7, 4, 1),  # 40 ... 43: the answer ends at EOS
    30: (1, 1, -1), 28: (3, 3, -1), 26: (5, 5, -1),  # z ends at EOS: at once, later, at L
    25: (5, 5, 0)}  # one after L is too late


@pytest.mark.parametrize("K", [1, 3])
def test_an_answer_follows_a_template_only(K):
    wanted = [row for row in WITH_ANSWER.values() for _ in range(K)]
    assert continued([*WITH_ANSWER], 5, 4, **RULES, K=K) == wanted
    # Without an answer the same z, and nothing after it.
    alone = [(end, end, reason) for _, end, reason in wanted]
    assert continued([*WITH_ANSWER], 5, 0, **RULES, K=K) == alone


def test_z_ends_once():
    """20 21 22 23 24: 21 ends z; 23, a template too, is part of the answer."""
    assert continued([20], 5, 4, [[21], [23]], [24]) == [(5, 2, 1)]
    assert continued([20], 2, 9, [[21], [23]], [24]) == [(5, 2, 1)]
    assert continued([20], 1, 9, [[21], [23]], [24]) == [(1, 1, 0)]


def test_dropped_rows_leave_the_others_in_place():
    first = torch.randint(1, 60, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    assert continued(first, 12, 6, **RULES) == [continued([t], 12, 6, **RULES)[0] for t in first]


# ------------------------------------------------------- inverse_cdf_sample

def picked(p: list[float], u: list[float], temperature: float = 1.0) -> list[int]:
    logits = torch.tensor(p).log().expand(len(u), -1)
    u = torch.tensor(u, dtype=torch.float64)
    return reference.inverse_cdf_sample(logits, u, temperature).tolist()


LAST = 1 - 2**-53  # the largest float64 below 1


@pytest.mark.parametrize("p, u, tokens", [
    ([0.25, 0.5, 0.25], [0, 0.24, 0.26, 0.74, 0.76, LAST], [0, 0, 1, 1, 2, 2]),
    # tokens of probability 0 are never drawn
    ([0, 0.5, 0, 0, 0.5, 0], [0, 0.49, 0.51, LAST], [1, 1, 4, 4]),
    ([0, 0, 1, 0], [0, 0.5, LAST], [2, 2, 2]),
    ([1, 1e-12], [0, 1 - 1.1e-12, 1 - 0.9e-12, LAST], [0, 0, 1, 1]),  # finer than float32
    ([1e-12, 1], [0, 0.9e-12, 1.1e-12, LAST], [0, 0, 1, 1]),
    ([3, 1], [0.74, 0.76], [0, 1])])  # softmax normalises
def test_inverts_the_cumulative_distribution(p, u, tokens):
    assert picked(p, u) == tokens


def test_inverse_cdf_temperature():
    """p^(1/T), normalised: 1 : 3 becomes 1 : 9 at T = 1/2, and 1 : 9 becomes 1 : 3 at T = 2."""
    assert picked([0.25, 0.75], [0.099, 0.101], 0.5) == [0, 1]
    assert picked([0.1, 0.9], [0.249, 0.251], 2.0) == [0, 1]


def test_inverse_cdf_draws_each_token_on_its_own_interval_only():
    """Against a plain loop, for large vocabularies and peaked distributions with zeros."""
    g = torch.Generator().manual_seed(0)
    for sharpness in (0.1, 3.0, 30.0):
        logits = sharpness * torch.randn(8, 5000, generator=g)
        logits[:, ::7] = -torch.inf
        u = torch.rand(8, generator=g, dtype=torch.float64)
        u[:2] = torch.tensor([0.0, LAST])
        tokens = reference.inverse_cdf_sample(logits, u, 1.0)
        for row, chance, token in zip(logits.double().softmax(-1), u, tokens):
            below, upto = row[:token].sum(), row[:token + 1].sum()
            assert row[token] > 0 and below - 1e-12 <= chance * row.sum() <= upto + 1e-12
