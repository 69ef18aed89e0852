"""Proves that the mean of the estimator is the exact gradient of the objective, by enumeration.

With five tokens and L of 2 or 3 there are so few ways to write and to end z that all can be listed:
17 or 49 outcomes. Plain forward passes over single sequences give the exact objective, and autograd
gives its exact gradient. latro.py is compared with that: the mean of its estimate over every
K-tuple of outcomes (split_rollout, pack_tree, logprobs, score_rationales, all as in training),
weighted by the probabilities with which the sampler is shown to draw them. Broken versions of the
estimator must fail: the mutants at the end of part 2.

Everything is in float64, so that a tolerance of 1e-12 hides no wrong term.
"""

import copy
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import kernels  # before transformers, which looks for a package of this name while it loads
import latro
from conftest import stops_of
from harness import data
from kernels import decode
from transformers import LlamaConfig, LlamaForCausalLM

V, EOS, STOPS = 5, 4, [[3], [1, 2]]  # an EOS token, and a template in two variants
CODEC = SimpleNamespace(stops=stops_of(V, *STOPS), eos=[EOS], template_at_start=[3],
                        template_after_z=[1, 2])
BATCH = [data.Example("", "", x, answer, []) for x, answer in (
    ([0, 2, 1], [2, 0]), ([2], [4]), ([1, 0, 3, 2, 0], [0, 1, 4]), ([3, 1], [1, 4]))]
COOL = 0.75  # a temperature that float32 holds exactly
OWN = 2  # tokens of the policy's own answer


def llama(seed: int, attention: str = "latro", dtype=torch.float64, layers: int = 1):
    """A random policy over V tokens. The same seed gives the same weights."""
    torch.manual_seed(seed)
    policy = LlamaForCausalLM(LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        bos_token_id=None, eos_token_id=None))
    for module in [*policy.modules()]:
        for name, child in module.named_children():
            if type(child).__name__ == "LlamaRMSNorm":  # would round to float32 inside
                setattr(module, name, nn.RMSNorm(16, child.variance_epsilon))
    for p in policy.parameters():
        nn.init.normal_(p, float(p.dim() == 1), 0.35)
    policy.set_attn_implementation(attention)
    policy.logprobs = latro.logprobs.__get__(policy)
    return policy.to(dtype)


def settings(**given) -> latro.Args:
    return latro.Args(**dict(K=2, L=2, beta=0.3, questions=2) | given)


def gradient(policy) -> torch.Tensor:
    """All of it as one vector, which is then reset."""
    g = torch.cat([p.grad.flatten() for p in policy.parameters()])
    policy.zero_grad()
    return g


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


# ------------------------------------------------------- 1. the exact objective, by plain means

def outcomes(L: int) -> dict[tuple[int, ...], int]:
    """Every way to write and to end z: the sampled ids -> what ended them: n for a template of n
    tokens, -1 for EOS, 0 for L."""
    found = {}
    for string in itertools.product(range(V), repeat=L):
        for n in range(1, L + 1):
            ids = string[:n]
            reason = next((len(s) for s in STOPS if list(ids[-len(s):]) == s), -(ids[-1] == EOS))
            if reason:
                break
        found[ids] = reason
    return found


def context_and_y(ids: list[int], reason: int, answer: list[int], credit: str):
    """What precedes y, and what y is: the rules of --credit, written a second time."""
    if reason > 0 and credit == "answer":
        return ids, answer
    z = ids[:len(ids) - abs(reason)]
    if reason > 0:
        return z, ids[len(z):] + answer
    return z, ([1, 2] if z else [3]) + answer


def replies(args: latro.Args) -> dict[tuple[int, ...], tuple[int, int]]:
    """What may be sampled in an update: the ids -> how many are z and what ended it, and what did.
    For the reward "correct", an answer of up to OWN tokens follows a template."""
    found = {}
    for z, reason in outcomes(args.L).items():
        answers = [()]
        if args.reward == "correct" and reason > 0:
            answers = [a for n in range(1, OWN + 1) for a in itertools.product(range(V), repeat=n)
                       if EOS not in a[:-1] and (n == OWN or a[-1] == EOS)]
        found |= {z + answer: (len(z), reason) for answer in answers}
    return found


def is_right(ids: list[int]) -> bool:
    """A verifier of no meaning, which looks at every token of a reply."""
    return sum(n * token for n, token in enumerate(ids, 1)) % 3 == 0


def log_pi_of_each(policy, before: list[int], tokens: list[int], temperature: float = 1.0):
    """log pi of each token after those before, by a forward over this one sequence."""
    logits = policy(torch.tensor([before + tokens])).logits[0, len(before) - 1:-1]
    logp = (logits / temperature).log_softmax(-1)
    return logp.gather(-1, torch.tensor(tokens)[:, None])[:, 0]


def log_pi(*args):
    return log_pi_of_each(*args).sum()


def objective(policy, reference, e: data.Example, args: latro.Args):
    """J of one question, and the probabilities of its outcomes."""
    rewards = {"logp": lambda ids, y: y.sum(), "prob": lambda ids, y: y.sum().exp(),
               "mean-prob": lambda ids, y: y.exp().mean(),
               "correct": lambda ids, y: torch.tensor(float(is_right(ids)), dtype=y.dtype)}
    logp, logp0, value, cut = [], [], [], []
    for ids, (end, reason) in replies(args).items():
        context, target = context_and_y([*ids[:end]], reason, e.answer, args.credit)
        logp.append(log_pi(policy, e.x, [*ids], args.temperature))
        logp0.append(log_pi(reference, e.x, [*ids], args.temperature) if reference else logp[-1])
        value.append(rewards[args.reward](ids, log_pi_of_each(policy, e.x + context, target)))
        cut.append(float(reason == 0))
    logp, logp0, value, cut = *map(torch.stack, (logp, logp0, value)), torch.tensor(cut)
    p = logp.exp()
    if args.bound == "elbo":
        J = (p * value).sum() - args.beta * (p * (logp - logp0)).sum()
        return J - args.truncation_penalty * (p * cut).sum(), p.detach()
    r = value - args.beta * (logp - logp0) - args.truncation_penalty * cut
    k = tuples(len(p), args.K)
    return (p[k].prod(1) * r[k].exp().mean(1).log()).sum(), p.detach()


def tuples(n: int, K: int) -> torch.Tensor:
    """(n^K, K): all of them, in order."""
    return torch.cartesian_prod(*[torch.arange(n)] * K)


def exact(batch, args: latro.Args):
    """The gradient of the mean objective of some questions, and their outcomes' probabilities."""
    policy = llama(1, "sdpa")
    reference = llama(2, "sdpa").requires_grad_(False) if args.beta else None
    J, p = zip(*[objective(policy, reference, e, args) for e in batch])
    (sum(J) / len(J)).backward()
    return gradient(policy), p


# ------------------------------------------------------- 2. the mean of the estimate

def expected(batch, chances, args: latro.Args):
    """The estimate of latro.score on every K-tuple of outcomes, times the tuple's probability."""
    policy, reference = llama(1), llama(2) if args.beta else None
    for e, p in zip(batch, chances):
        credit = "reply" if args.reward == "correct" else args.credit
        z = [latro.split_rollout(CODEC, [*ids], end, reason, e.answer, credit)._replace(
                right=is_right(ids)) for ids, (end, reason) in replies(args).items()]
        for k in tuples(len(z), args.K).split(4096):
            groups = [[z[i] for i in row] for row in k.tolist()]
            logp, s = latro.score(policy, reference, [e] * len(k), groups, args)
            tokens = [sum(len(r.actions) + len(r.y) for r in g) for g in groups]
            chance = p[k].prod(1).repeat_interleave(torch.tensor(tokens))
            (chance * s.token_weights * logp).sum().backward()
    return gradient(policy)


CASES = dict(
    answer=dict(), full=dict(credit="full"), longer=dict(L=3), three=dict(K=3),
    no_reference=dict(beta=0.0), cool=dict(temperature=COOL), penalty=dict(truncation_penalty=1.5),
    full_cool=dict(credit="full", temperature=COOL, truncation_penalty=0.5),
    prob=dict(reward="prob"), prob_full=dict(reward="prob", credit="full", temperature=COOL),
    prob_penalty=dict(reward="prob", truncation_penalty=0.5, K=3),
    mean_prob=dict(reward="mean-prob"),
    mean_prob_full=dict(reward="mean-prob", credit="full", temperature=COOL, K=3),
    correct=dict(reward="correct"), correct_no_reference=dict(reward="correct", beta=0.0),
    correct_penalty=dict(reward="correct", truncation_penalty=0.5, temperature=COOL),
    iwae=dict(bound="iwae"), iwae_three=dict(bound="iwae", K=3),
    iwae_full=dict(bound="iwae", credit="full", L=3),
    iwae_no_reference=dict(bound="iwae", beta=0.0),
    iwae_cool=dict(bound="iwae", K=3, temperature=COOL, truncation_penalty=1.5))


@pytest.mark.parametrize("case", CASES)
def test_mean_of_the_estimate_is_the_exact_gradient(case):
    args, batch = settings(**CASES[case]), BATCH[:2]
    g, chances = exact(batch, args)
    for p in chances:
        assert abs(p.sum() - 1) < 1e-12 and p.min() > 1e-8 and p.max() < 0.9
    wrong = error(expected(batch, chances, args), g)
    print(f"{case}: relative error {wrong:.1e}")
    assert wrong < 1e-12


def reweighted(change):
    """Mutants of score_rationales: change(w_z, w_y, r, K, beta, total), (N,) each."""
    def mutant(logp, logp0, z_start, y_start, end, K, beta, **options):
        s = kernels.score_rationales(logp, logp0, z_start, y_start, end, K, beta, **options)
        w = change(s.token_weights[z_start], s.token_weights[y_start], s.reward, K, beta,
                   options["total"])
        tokens = torch.stack([y_start - z_start, end - y_start], 1).flatten()
        weights = torch.stack(w, 1).flatten().repeat_interleave(tokens)
        return s._replace(token_weights=weights)
    return "score_rationales", mutant


def repacked(change):
    """Mutants of pack_tree: change(tree, all rationales)."""
    pack_tree = latro.pack_tree

    def mutant(prompts, groups, *rest):
        tree = pack_tree(prompts, groups, *rest)
        return change(tree, [r for group in groups for r in group])
    return "pack_tree", mutant


def ended_for_free(by: str):
    """What ended z is not an action: no score, no gradient, no KL."""
    def change(tree, z):
        targets = tree.targets.clone()
        for r, y_start in zip(z, tree.spans[1]):
            if not r.truncated and by == ("eos" if r.actions[-1] == EOS else "template"):
                targets[y_start - (len(r.actions) - r.length):y_start] = -100
        return tree._replace(targets=targets)
    return repacked(change)


def last_token_for_free(tree, z):
    """The last token of the policy's own answer is not an action."""
    targets = tree.targets.clone()
    targets[[y_start - 1 for r, y_start in zip(z, tree.spans[1]) if not r.truncated]] = -100
    return tree._replace(targets=targets)


def share_of_kl(w_z, w_y, r, K, beta, total):
    """The iwae without its own gradient of the KL, -beta s_k."""
    return w_z + K * beta * r.view(-1, K).softmax(1).flatten() / total, w_y


MUTANTS = dict(  # name: the case it shows in, the name in latro.py to replace, by what
    no_z_term=("answer", *reweighted(lambda w_z, w_y, *_: (0 * w_z, w_y))),
    no_y_term=("answer", *reweighted(lambda w_z, w_y, *_: (w_z, 0 * w_y))),
    no_y_term_iwae=("iwae", *reweighted(lambda w_z, w_y, *_: (w_z, 0 * w_y))),
    # r_k less the mean of all K is (K - 1) / K of r_k less the mean of the others
    own_baseline=("answer", *reweighted(lambda w_z, w_y, r, K, *_: (w_z * (K - 1) / K, w_y))),
    no_share_of_kl=("iwae", *reweighted(share_of_kl)),
    free_template=("answer", *ended_for_free("template")),
    free_template_full=("full", *ended_for_free("template")),
    free_template_iwae=("iwae", *ended_for_free("template")),
    free_eos=("answer", *ended_for_free("eos")),
    free_eos_iwae=("iwae", *ended_for_free("eos")),
    # Two defects of the released code: the answer's sum starts at the last token of z, and the
    # sampling temperature is ignored.
    early_answer=("answer", *repacked(lambda tree, _: tree._replace(
        spans=(tree.spans[0], tree.spans[1] - 1, tree.spans[2])))),
    no_temperature=("cool", *repacked(lambda tree, _: tree._replace(
        temperature=torch.ones_like(tree.temperature)))),
    free_answer=("correct", *repacked(last_token_for_free)),
    # Every token of y by the probability of the first.
    mean_prob_of_the_first_token=("mean_prob", *reweighted(lambda w_z, w_y, *_: (w_z, w_y))),
    no_penalty=("penalty", "score_rationales",
                lambda *a, penalty, **options: kernels.score_rationales(*a, **options)))


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_estimator_fails(mutant, monkeypatch):
    case, name, broken = MUTANTS[mutant]
    args, batch = settings(**CASES[case]), BATCH[:2]
    g, chances = exact(batch, args)
    monkeypatch.setattr(latro, name, broken)
    wrong = error(expected(batch, chances, args), g)
    print(f"{mutant}: relative error {wrong:.1e}")
    assert wrong > 1e-2


# ------------------------------------------------------- 3. the sampler draws those outcomes

def script(policy, x: list[int], L: int, temperature: float, within: float) -> torch.Tensor:
    """Uniform numbers (outcomes, L) that must write each outcome: of every token's interval of the
    distribution function, the point `within` (0 to 1) of its width."""
    u = torch.full((len(outcomes(L)), L), 0.5, dtype=torch.float64)
    for row, ids in zip(u, outcomes(L)):
        logits = policy(torch.tensor([x + [*ids]])).logits[0, len(x) - 1:-1]
        p = (logits / temperature).softmax(-1)
        for t, token in enumerate(ids):
            row[t] = p[t, :token].sum() + within * p[t, token]
    return u


@pytest.mark.parametrize("within", [1e-3, 0.5, 0.999])
@pytest.mark.parametrize("L, temperature", [(2, 1.0), (3, 1.0), (3, COOL), (4, 1.0)])
@torch.no_grad()
def test_every_outcome_has_its_interval(L, temperature, within):
    """The sampler turns a box of uniform numbers into each outcome; the box has the volume of the
    outcome's exact probability. From edge to edge: so it draws the distribution of part 1."""
    policy, stock, prompts = llama(1), llama(1, "sdpa"), [e.x for e in BATCH]
    u = torch.cat([script(stock, x, L, temperature, within) for x in prompts])
    drawn = latro.sample_rationales(policy, prompts, CODEC.stops, [EOS], len(outcomes(L)), L, u,
                                    temperature)
    wanted = [([*ids], len(ids), reason) for ids, reason in outcomes(L).items()]
    assert drawn == wanted * len(prompts)


@pytest.mark.parametrize("others", ["none", "long", "short"])
@torch.no_grad()
def test_outcomes_do_not_depend_on_other_rows(others, monkeypatch):
    """Each alone; with nine rows that L ends, of which none is dropped; with nine that end at
    once."""
    kept, select_rows = [], decode.Decoder.select_rows

    def spy(self, rows):
        kept.append(len(rows))
        select_rows(self, rows)
    monkeypatch.setattr(decode.Decoder, "select_rows", spy)
    policy, e, L = llama(1), BATCH[0], 3
    wanted = [([*ids], len(ids), reason) for ids, reason in outcomes(L).items()]
    other = wanted.index(([0, 0, 0], 3, 0) if others == "long" else ([EOS], 1, -1))
    n, U = 0 if others == "none" else 9, script(llama(1, "sdpa"), e.x, L, 1.0, 0.5)
    for u, outcome in zip(U, wanted):
        u = torch.stack([u] + n * [U[other]])
        drawn = latro.sample_rationales(policy, [e.x], CODEC.stops, [EOS], 1 + n, L, u)
        assert drawn == [outcome] + n * [wanted[other]]
    drops = sum(len(ids) > 1 for ids in outcomes(L)) if others == "short" else 0
    assert kept == [1] * drops


@pytest.mark.parametrize("temperature", [1.0, COOL])
def test_frequencies(temperature):
    """40 000 draws by the rollout of training against the exact probabilities: z of each outcome,
    and chi^2 of all. By chance alone one seed in a few hundred would fail."""
    n, args = 20_000, settings(L=3, temperature=temperature, seed=1)
    groups = latro.rollout(llama(1), CODEC, BATCH[:2], [0, 1], 0, args, n)
    for e, group in zip(BATCH, groups):
        with torch.no_grad():
            p = np.array([float(log_pi(llama(1, "sdpa"), e.x, [*ids], temperature).exp())
                          for ids in outcomes(3)])
        place = {ids: i for i, ids in enumerate(outcomes(3))}
        count = np.bincount([place[tuple(r.actions)] for r in group], minlength=len(p))
        z = (count - n * p) / np.sqrt(n * p * (1 - p))
        chi2, free = float(((count - n * p) ** 2 / (n * p)).sum()), len(p) - 1
        print(f"largest |z| {abs(z).max():.2f}, chi^2 {chi2:.1f} on {free}")
        assert abs(z[n * p > 5]).max() < 4.5 and abs(chi2 - free) < 4 * math.sqrt(2 * free)


# ------------------------------------------------------- 4. how an update is put together

def drawn(args, K: int, dtype=torch.float64):
    return latro.rollout(llama(1, dtype=dtype), CODEC, BATCH, [*range(len(BATCH))], 1, args, K)


def accumulated(groups, args: latro.Args, micro: int, dtype=torch.float64) -> torch.Tensor:
    """The gradient of an update over BATCH, `micro` questions per forward pass."""
    policy, reference = llama(1, dtype=dtype), llama(2, dtype=dtype)
    for i in range(0, len(BATCH), micro):
        logp, s = latro.score(policy, reference, BATCH[i:i + micro], groups[i:i + micro], args)
        (s.token_weights * logp).sum().backward()
    return gradient(policy)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("bound", ["elbo", "iwae"])
def test_micro_batches_change_nothing(bound, dtype, tolerance):
    args = settings(K=3, L=4, questions=len(BATCH), bound=bound)
    groups = drawn(args, 3, dtype)
    whole = accumulated(groups, args, len(BATCH), dtype)
    wrong = [error(accumulated(groups, args, micro, dtype), whole) for micro in (1, 2, 3)]
    print(f"relative errors {wrong}")
    assert max(wrong) < tolerance


def test_averaging_over_the_micro_batch_fails(monkeypatch):
    args = settings(K=3, L=4, questions=len(BATCH))
    groups = drawn(args, 3)
    whole = accumulated(groups, args, len(BATCH))
    monkeypatch.setattr(latro, "score_rationales",
                        lambda *a, total, **options: kernels.score_rationales(*a, **options))
    assert error(accumulated(groups, args, len(BATCH)), whole) < 1e-13  # all at once: the same
    assert error(accumulated(groups, args, 1), whole) > 1


def test_rationales_do_not_depend_on_the_batch():
    args = settings(K=3, L=4)
    groups = drawn(args, 3)
    for ids in ([2], [3, 0], [1, 2, 3]):
        part = latro.rollout(llama(1), CODEC, [BATCH[i] for i in ids], ids, 1, args, 3)
        assert part == [groups[i] for i in ids]


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_is_exactly_0_before_the_first_update(dtype, checkpointing):
    """Bit-equal for every token, though one forward pass keeps a graph and the other does not."""
    policy, args = llama(1, dtype=dtype, layers=2), settings(K=3, L=4, temperature=COOL)
    reference = copy.deepcopy(policy).requires_grad_(False)
    if checkpointing:
        policy.gradient_checkpointing_enable()
        reference.gradient_checkpointing_enable()
    groups = drawn(args, 3)
    logp, s = latro.score(policy, reference, BATCH, groups, args)
    with torch.no_grad():
        logp0 = reference.logprobs(latro.pack_tree([e.x for e in BATCH], groups, COOL, reference))
    assert logp.requires_grad and torch.equal(logp.detach(), logp0)
    assert torch.equal(s.logp_z, s.logp0_z) and torch.equal(s.reward, s.logp_y)


def test_the_base_itself_is_computed_once(monkeypatch):
    """eval.py grades the base as the policy and as pi_0 at the same time."""
    policy, args, passes = llama(1), settings(K=3, L=4), []
    groups = drawn(args, 3)
    twice = latro.score(policy, copy.deepcopy(policy), BATCH, groups, args)[1]
    logprobs = policy.logprobs
    monkeypatch.setattr(policy, "logprobs", lambda tree: passes.append(tree) or logprobs(tree))
    once = latro.score(policy, policy, BATCH, groups, args)[1]
    assert len(passes) == 1 and all(map(torch.equal, once, twice))
    assert not once.logp0_z.requires_grad


def test_sft_is_the_likelihood_of_rationale_and_answer():
    args, stock, policy = settings(questions=len(BATCH)), llama(1, "sdpa"), llama(1)
    given = [[0, 2], [], [2, 0, 1], []]
    groups = [[latro.gold_rationale(CODEC, z, e.answer)] for z, e in zip(given, BATCH)]
    logp, s = latro.score(policy, None, BATCH, groups, args, given=True)
    (s.token_weights * logp).sum().backward()
    whole = [log_pi(stock, e.x, z + ([1, 2] if z else [3]) + e.answer)
             for z, e in zip(given, BATCH)]
    (sum(whole) / len(whole)).backward()
    assert error(gradient(policy), gradient(stock)) < 1e-13
    assert torch.allclose(s.logp_z + s.logp_y, torch.stack(whole), atol=1e-13)


# ------------------------------------------------------- 5. score_rationales

def log_mean_exp(r: list[float]) -> float:
    return max(r) + math.log(sum(math.exp(v - max(r)) for v in r) / len(r))


def one_by_one(logp, logp0, spans, K, beta, bound="elbo", reward="logp", answer_weight=1.0,
               penalty=None, total=None, right=None):
    """score_rationales in plain Python, a rationale at a time, by the formulas of its docstring."""
    rows, weights, on_ys = [], [], []
    for n, (a, b, c) in enumerate(spans):
        logp_z, logp0_z, logp_y = sum(logp[a:b]), sum((logp0 or logp)[a:b]), sum(logp[b:c])
        p = [math.exp(v) for v in logp[b:c]]
        gain, slopes = {
            "logp": lambda: (logp_y, [1.0] * len(p)),
            "prob": lambda: (math.exp(logp_y), [math.exp(logp_y)] * len(p)),
            "mean-prob": lambda: (sum(p) / max(1, len(p)), [v / len(p) for v in p]),
            "correct": lambda: (float(right[n]), [0.0] * len(p))}[reward]()
        on_ys.append(slopes)
        rows.append([logp_z, logp0_z, logp_y, gain - beta * (logp_z - logp0_z) - penalty[n]])
    for n, (a, b, c) in enumerate(spans):
        k, group = n % K, [row[3] for row in rows[n - n % K:n - n % K + K]]
        r, others = group[k], group[:k] + group[k + 1:]
        if bound == "elbo":
            A = r - sum(others) / (K - 1)
            on_z, on_y = A, 1.0
        else:
            A, s = log_mean_exp(group) - log_mean_exp(others), math.exp(r - log_mean_exp(group)) / K
            on_z, on_y = K * (A - beta * s), K * s  # K / N = 1 / B: a question's share is one
        rows[n].append(A)
        N = total or len(spans)
        weights += [on_z / N] * (b - a) + [answer_weight * on_y * v / N for v in on_ys[n]]
    return *zip(*rows), weights


@pytest.mark.parametrize("K", [2, 3, 5])
@pytest.mark.parametrize("options", [
    dict(), dict(reward="prob"), dict(reward="mean-prob"), dict(reward="correct"),
    dict(bound="iwae"), dict(answer_weight=0.3, total=100),
    dict(reward="mean-prob", answer_weight=0.3, total=100),
    dict(bound="iwae", answer_weight=0.3, total=100)], ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_score_rationales_one_by_one(K, options, dtype, tolerance, scale):
    """Ragged lengths, some z empty, rewards close together and far apart, a penalty on some."""
    rng = np.random.default_rng(K)
    lengths = np.stack([rng.integers(0, 6, 4 * K), rng.integers(1, 5, 4 * K)], 1)
    lengths[::3, 0] = 0
    edges = np.concatenate([[0], lengths.cumsum()])
    spans = edges[:-1:2], edges[1::2], edges[2::2]
    logp, logp0 = torch.tensor(-scale * rng.random((2, edges[-1]))).to(dtype)
    penalty = torch.tensor(rng.integers(0, 2, 4 * K) * 1.5).to(dtype)
    options = options | dict(right=torch.arange(4 * K) % 3 == 1)
    for reference, beta in ((logp0, 0.3), (None, 0.0)):
        s = kernels.score_rationales(
            logp, reference, *map(torch.tensor, spans), K, beta, penalty=penalty, **options)
        known = None if reference is None else reference.tolist()
        plain = one_by_one(logp.tolist(), known, [*zip(*spans)], K, beta,
                           penalty=penalty.tolist(), **options)
        assert (s.logp0_z is None) == (reference is None)
        for name, found, wanted in zip(s._fields, s, plain):
            if found is not None:
                wanted, found = torch.tensor(wanted, dtype=torch.float64), found.double()
                assert found.shape == wanted.shape and not found.requires_grad
                assert (found - wanted).abs().max() <= tolerance * max(1, wanted.abs().max()), name


def test_one_rationale_has_no_baseline():
    spans = torch.tensor([0]), torch.tensor([1]), torch.tensor([2])
    with pytest.raises(ValueError, match="K = 1"):
        kernels.score_rationales(torch.zeros(2), None, *spans, 1, 0.0)


# ------------------------------------------------------- 6. token_logprobs

def hidden(T: int, V: int, D: int = 8, dtype=torch.float64):
    """h, W, targets, every fourth of them -100."""
    g = torch.Generator().manual_seed(T)
    h, W = (torch.randn(n, D, generator=g, dtype=torch.float64).to(dtype) for n in (T, V))
    targets = torch.randint(V, (T,), generator=g)
    targets[::4] = -100
    return h.requires_grad_(), W.requires_grad_(), targets


def in_one_piece(h, W, targets, temperature):
    """The definition, in float64, [T, V] and all."""
    temperature = torch.as_tensor(temperature, dtype=torch.float64).view(-1, 1)
    logp = (h.double() @ W.double().T / temperature).log_softmax(-1)
    return torch.stack([row[t] if t >= 0 else 0 * row[0] for row, t in zip(logp, targets)])


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7, torch.linspace(0.5, 2, 13)],
                         ids=["1", "0.7", "a_row"])
@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)])
def test_token_logprobs(dtype, tolerance, temperature, rows, monkeypatch):
    """Values to `tolerance` of the largest, gradients also to their own dtype, bfloat16's 2^-7; in
    chunks of `rows` tokens."""
    h, W, targets = hidden(13, 31, dtype=dtype)
    monkeypatch.setattr(kernels.reference, "CHUNK", rows * len(W))
    logp = kernels.token_logprobs(h, W, targets, temperature)
    wanted = in_one_piece(h, W, targets, temperature)
    assert logp.dtype == torch.promote_types(dtype, torch.float32)
    assert (logp - wanted).abs().max() < tolerance * wanted.abs().max() and (logp[::4] == 0).all()
    weights = torch.linspace(-1, 1, 13, dtype=torch.float64)
    found = torch.autograd.grad((weights * logp).sum(), (h, W))
    for a, b in zip(found, torch.autograd.grad((weights * wanted).sum(), (h, W))):
        assert a.dtype == dtype
        assert error(a.double(), b.double()) < max(tolerance, torch.finfo(dtype).eps)
    assert (found[0][::4] == 0).all()


def test_token_logprobs_gradcheck(monkeypatch):
    h, W, targets = hidden(5, 7, 3)
    monkeypatch.setattr(kernels.reference, "CHUNK", 2 * len(W))
    assert torch.autograd.gradcheck(lambda h, W: kernels.token_logprobs(h, W, targets, 0.7), (h, W))


def test_token_logprobs_with_all_targets_ignored_or_none_given():
    h, W, targets = hidden(5, 7, 3)
    for h, targets in ((h, torch.full_like(targets, -100)), (h[:0], targets[:0])):
        logp = kernels.token_logprobs(h, W, targets)
        dh, dW = torch.autograd.grad(logp.sum(), (h, W), materialize_grads=True)
        assert logp.shape == targets.shape and not logp.any() and not dh.any() and not dW.any()


def test_token_logprobs_refuses_targets_outside_the_vocabulary():
    """Only -100 is ignored: any other number outside the vocabulary is an error."""
    h, W, targets = hidden(5, 7, 3)
    for wrong in (-1, -101, 7):
        targets[1] = wrong
        with pytest.raises(RuntimeError, match="index"):
            kernels.token_logprobs(h, W, targets)


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that an operation makes."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        sizes = [t.numel() for t in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(t)]
        self.numel = max([self.numel, *sizes])
        return out


def test_all_logits_are_never_held(monkeypatch):
    """No tensor of the forward or the backward pass is as large as [T, V]."""
    h, W, targets = hidden(64, 100, 4)
    monkeypatch.setattr(kernels.reference, "CHUNK", 4 * len(W))
    with Largest() as largest:
        kernels.token_logprobs(h, W, targets).sum().backward()
    assert largest.numel == 4 * len(W)
    with Largest() as largest:
        in_one_piece(h, W, targets, 1.0).sum().backward()
    assert largest.numel == 64 * len(W)
