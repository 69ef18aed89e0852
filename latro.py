"""LaTRO, LaTent Reasoning Optimization (Chen et al., arXiv 2411.04282): the method, in one file.

A policy writes K rationales z for a question x. Its own log-probability of the gold answer y after
each of them is the reward: no reward model, no verifier, no gold rationales.

    python latro.py                                                        a toy, on a laptop
    torchrun --nproc_per_node 8 latro.py --model meta-llama/Llama-3.1-8B   the paper's GSM8K run

Objective (eq. 3), with pi_0 the policy before training, frozen:
    J = E_{z ~ pi(.|x)}[ log pi(y|x+z) ] - beta KL( pi(z|x) || pi_0(z|x) )
Its gradient (eq. 4), estimated from K rationales for each of B questions, N = B K in all:
    1/N sum_k  A_k grad log pi(z_k|x) + grad log pi(y|x+z_k)
    r_k = log pi(y|x+z_k) - beta log( pi(z_k|x) / pi_0(z_k|x) )
    A_k = r_k - mean of the other K - 1 rewards

x, y, z                  question, answer, rationale: lists of token ids
K, L, beta               rationales per question, longest z in tokens, weight of the KL
B, N, T                  questions, rationales N = B K, scored tokens
logp_z, logp0_z, logp_y  log pi(z|x), log pi_0(z|x), log pi(y|x+z): sums over tokens, nats
r, A                     reward and leave-one-out advantage of a rationale, nats

Read from the bottom if you know the method: `train` is the paper's Algorithm 1. From the top: what
a rationale is and where it ends (2), the question tree (3), the ELBO (4), the step (5).
"""

import dataclasses
import math
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import kernels  # before transformers: see there
from harness import config, memory
from harness.answers import answer_in, same_answer
from harness.checkpoint import (append_jsonl, init_run_dir, record_schedule, restore_checkpoint,
                                save_checkpoint)
from harness.codec import Codec, Example
from harness.config import flag
from harness.data import PROMPTS, TASKS, load_datasets
from harness.distributed import (all_gather_list, assign_micro_batches, backward,
                                 catch_stop_signals, compute_dtype, exit_process,
                                 init_distributed, is_main_process, local_slice, print0, processes,
                                 unsharded)
from harness.equivalence import check_equivalence
from harness.errors import DIVERGENCE_HINT, UserError, run_cli, timed
from harness.lora import FrozenBase
from harness.metrics import check_finite, peak_memory, records, summary, throughput
from harness.model import check_same_shape, load_config, load_model
from harness.report import HEADLINES, before_and_after, how_rationales_end
from harness.trackers import start_tracker, stop_tracker, track
from kernels import token_logprobs
from kernels.attention import Layout, build_layout, logits_divisor
from kernels.decode import CUDAGraphRunner, Decoder, DecodeState, compact
from kernels.reference import Scores, inverse_cdf_sample

HERE = Path(__file__).resolve().parent
SAMPLES, ORDER = 0, 1  # what random numbers are for: no two uses share a stream
REWARDS = "logp", "prob", "mean-prob", "correct"


# ------------------------------------------------------------------------------ 1. settings
@dataclasses.dataclass
class Args:
    """The settings of a run. PRESETS sets what differs by task."""
    model: str = flag(None, "hub id or directory; the toy ships with this file",
                      group="model and data")
    reference: str = flag(None, "pi_0 where it is another model than --model: id or directory")
    task: str = flag(None, "kind of question", (*TASKS,))
    data: str = flag(None, "directory with train.jsonl and test.jsonl, or a hub id")
    prompt: str = flag(None, 'what is asked, with "{question}" in it')
    system: str = flag(None, "what precedes it; with a chat template, the system turn")
    shots: int = flag(0, "worked examples in the prompt: training rows with a rationale", least=0)
    date: str = flag(None, "day that a chat template prints (default: today)")
    out: str = flag("out", "directory of the run: a Hugging Face model, logs, state")
    objective: str = flag("latro", "sft: summed log pi(y|x), with gold z if any", ("latro", "sft"),
                          group="objective")
    bound: str = flag("elbo", "iwae: log mean of pi(y|x+z) (pi_0/pi)^beta", ("elbo", "iwae"))
    reward: str = flag("logp", "prob: pi(y|x+z) itself; mean-prob: of a token of y; correct: 1 if"
                               " the policy's own answer is right, else 0", REWARDS)
    credit: str = flag("answer", "y: the answer, or template and answer", ("answer", "full"))
    beta: float = flag(0.05, "weight of the KL to the starting policy; 0 loads none", least=0)
    answer_weight: float = flag(1.0, "of eq. 4's answer term; 0: the released code", least=0)
    truncation_penalty: float = flag(0.0, "nats off the reward of a z that L cut", least=0)
    K: int = flag(16, "rationales per question; a baseline needs 2", least=2, group="sampling")
    L: int = flag(500, "longest rationale, tokens", least=1)
    temperature: float = flag(1.0, "of sampling z, and of pi(z|x) in the objective", least=1e-3)
    questions: int = flag(None, "questions per update, over all processes (3 each)", least=1,
                          group="optimization")
    micro: int = flag(8192, "tokens per forward pass; a question is never split", least=1)
    steps: int = flag(None, "updates (or give --epochs)", least=1)
    epochs: float = flag(6.0, "passes over the training questions (or give --steps)", least=1e-9)
    lr: float = flag(5e-7, "peak learning rate of AdamW, falling linearly to 0", least=0)
    warmup: int = flag(0, "updates over which the learning rate rises", least=0)
    grad_clip: float = flag(1.0, "largest gradient norm; 0: no clipping", least=0)
    lora_rank: int = flag(0, "train adapters of this rank instead of all weights; 0: none", least=0)
    lora_alpha: float = flag(16.0, "adapters are multiplied by alpha / rank", least=1e-9)
    eval_every: int = flag(100, "updates between evaluations; 0: first and last only", least=0,
                           group="evaluation and saving")
    eval_questions: int = flag(200, "held-out questions of an evaluation", least=1)
    save_every: int = flag(100, "updates between checkpoints; 0: at the end only", least=0)
    keep: int = flag(2, "states to keep, in case the last one is damaged", least=1)
    log_to: str = flag(None, "also log there", ("tensorboard", "wandb", "trackio"))
    seed: int = flag(0, "of the data order and the samples", least=0)
    resume: bool = flag(False, "continue from the last checkpoint in --out")
    shard: int = flag(0, "processes that share one copy of the weights; 0: all", least=0,
                      group="machine")
    timeout: float = flag(30.0, "minutes that processes wait for each other", least=1e-3)
    checkpointing: bool = flag(None, "recompute activations; by default if memory asks for it")
    plan: int = flag(0, "GPUs to plan for: print what a run on them needs, and exit", least=0)
    kernels: str = flag("auto", "the fused operations", kernels.BACKENDS)
    matmul_precision: str = flag("highest", "of float32 products", ("highest", "high", "medium"))


PRESETS = {  # where a task differs from the paper's GSM8K run, which the defaults above are
    "toy": dict(model=str(HERE / "toy/model"), data=str(HERE / "toy"), L=48, lr=3e-4, steps=50,
                epochs=None, questions=8, eval_every=0, save_every=0),
    "gsm8k": dict(data="openai/gsm8k"),
    "arc_challenge": dict(data="allenai/ai2_arc", beta=0.25, epochs=12.0), "qa": {},
}
PRESETS = {task: dict(prompt=PROMPTS[task]) | own for task, own in PRESETS.items()}


# ------------------------------------------------------------------------------ 2. rationales
class StopCriteria(NamedTuple):
    """Where a rationale ends: at the template ("The answer is"), at EOS, or after L tokens."""

    stops: Tensor  # (n + 1, V): what a token adds to the template's n characters; see stop_table
    eos: Tensor  # ids that end a reply
    L: int
    max_answer_tokens: int  # decoded after the template, to read the policy's own answer; 0: none

    def update(self, state: DecodeState) -> None:
        """Notes which running rows end with their last token. Device work only: no row waits."""
        row, token, drawn = state.row, state.token, state.drawn
        is_eos = (token[:, None] == self.eos).any(1)
        matched = self.stops[state.matched, token].long()  # of its characters; < 0: begins here
        state.template_tokens.add_(1).masked_fill_(matched < 0, 1)
        state.matched.copy_(matched.abs())
        is_template = state.matched == len(self.stops) - 1
        # -1: EOS; n: a template of n tokens; 0: none.
        reason = state.template_tokens.where(is_template, -is_eos.long())
        ended = state.running & (state.end[row] == 0) & ((reason != 0) | (drawn == self.L))
        state.end[row] = drawn.where(ended, state.end[row])
        state.stop_reason[row] = reason.where(ended, state.stop_reason[row])
        # A z that L cut stops at once; after a template the answer may follow.
        no_answer = state.stop_reason[row] == 0
        answered = drawn == state.end[row] + self.max_answer_tokens
        state.running &= ~is_eos & ~((state.end[row] > 0) & (no_answer | answered))


@torch.no_grad()
def sample_rationales(policy, prompts: list[list[int]], stops: Tensor, eos: list[int], K: int,
                      L: int, uniform: Tensor, temperature: float = 1.0,
                      max_answer_tokens: int = 0) -> list[tuple[list[int], int, int]]:
    """K continuations of each of B prompts: z ~ pi(.|x).

    uniform (B K, L + max_answer_tokens) in [0, 1) drives the samples; a row of NaN is greedy.
    `stops` recognises the template. Returns for each rationale its ids, how many of them are z and
    what ended it, and what did: n for a template of n tokens, 0 for L, -1 for EOS."""
    device, max_tokens = policy.device, L + max_answer_tokens
    uniform, any_greedy = uniform.to(device), bool(uniform.isnan().any())
    criteria = StopCriteria(stops.to(device), torch.tensor(eos, device=device), L,
                            max_answer_tokens)
    state = DecodeState(len(prompts) * K, max_tokens, device)
    decoder = Decoder(policy, prompts, K, max_tokens)
    temperature *= logits_divisor(policy.config)

    def draw(logits: Tensor) -> None:
        """A token for each row from its logits (rows, V); notes which rows have ended."""
        numbers = uniform[state.row, state.drawn]  # (rows,)
        token = inverse_cdf_sample(logits, numbers, temperature)
        if any_greedy:
            token = logits.argmax(-1).where(numbers.isnan(), token)
        state.append(token)
        criteria.update(state)

    def step() -> None:
        draw(decoder.decode_step(state.token))

    run_step = CUDAGraphRunner(step) if decoder.pace.cuda_graphs else lambda shape: step()
    draw(decoder.prefill())  # each prompt once; the first token of all B K rows
    for length in range(1, max_tokens):
        if length % decoder.pace.stop_check_every == 0:  # the host waits here, and only here
            running = int(state.running.sum())
            if running == 0:
                break
            compact(state, decoder, running)  # drop finished rows
        run_step(decoder.set_length(length))
    drawn = zip(state.ids.tolist(), state.end.tolist(), state.stop_reason.tolist())
    return [([token for token in ids if token >= 0], end, reason) for ids, end, reason in drawn]


class Rationale(NamedTuple):
    """A finished z, and the y to score after it. Its row in the tree is actions[:context] + y."""

    ids: list[int]  # all that was sampled; in an evaluation the policy's own answer follows z
    actions: list[int]  # z and what ended it: the tokens of pi(z|x)
    context: int  # how many actions y follows: not an EOS, nor a template that y repeats
    y: list[int]
    length: int  # tokens of z, without what ended it
    truncated: bool  # L cut z
    right: bool | None = None  # the policy's own answer is correct; None where it gave none


def split_rollout(codec, ids: list[int], end: int, stop_reason: int, answer: list[int],
                  credit: str) -> Rationale:
    """What counts as z and what as y. How z ended is an action of the policy like any other, in the
    score function and in the KL:

    z ended by    actions       y
    template      z template    answer             --credit answer: stopping belongs to z
    template      z template    template answer    --credit full: the paper to the letter
    EOS           z EOS         template answer    y follows z, not EOS
    L             z             template answer    so a cut z pays for the template inside r
    any           all of ids    nothing            credit "reply": what --reward correct learns from
    """
    actions, length = ids[:end], end - abs(stop_reason)
    if credit == "reply":
        return Rationale(ids, ids, len(ids), [], length, stop_reason == 0)
    if stop_reason <= 0:
        template = codec.template_after_z if length else codec.template_at_start
        return Rationale(ids, actions, length, template + answer, length, stop_reason == 0)
    if credit == "full":
        return Rationale(ids, actions, length, actions[length:] + answer, length, False)
    return Rationale(ids, actions, end, answer, length, False)


def gold_rationale(codec, z: list[int], answer: list[int]) -> Rationale:
    """A given rationale, or none, with template and answer, all of it scored: what SFT learns."""
    actions = z + (codec.template_after_z if z else codec.template_at_start)
    return Rationale([], actions, len(actions), answer, len(z), False)


def rng_stream(seed: int, step: int, question_id: int) -> np.random.Generator:
    """The random numbers of one question in one update (step 0: evaluation)."""
    return np.random.default_rng((seed, step, question_id, SAMPLES))


def own_answer(codec: Codec, example: Example, ids: list[int]) -> dict:
    """The text of a reply, the answer that it gives, and whether that is right."""
    text = codec.text(ids)
    said = answer_in(text)
    return dict(text=text, said=said, right=same_answer(said, example.gold))


def answer_limit(codec: Codec, examples: list[Example]) -> int:
    """Tokens that the policy may write after the template: as many as any gold answer needs."""
    return max(len(example.answer) for example in examples) + len(codec.template_after_z)


def rollout(policy, codec: Codec, examples: list[Example], question_ids: list[int], step: int,
            args: Args, K: int, max_answer_tokens: int = 0, greedy: bool = False,
            credit: str | None = None) -> list[list[Rationale]]:
    """K rationales per question: [B][K], or [B][1 + K] with the greedy one first. Samples depend
    only on (seed, step, question), not on batching. With `max_answer_tokens` the policy also
    answers."""
    streams = [rng_stream(args.seed, step, question_id) for question_id in question_ids]
    uniform = torch.tensor(np.array([  # z's numbers first, whatever follows
        np.hstack([rng.random((K, args.L)), rng.random((K, max_answer_tokens))])
        for rng in streams]))  # (B, K, L + max_answer_tokens)
    uniform = F.pad(uniform, (0, 0, int(greedy), 0), value=math.nan)
    rows, prompts = uniform.shape[1], [example.x for example in examples]
    drawn = iter(sample_rationales(policy, prompts, codec.stops, codec.eos, rows, args.L,
                                   uniform.flatten(0, 1), args.temperature, max_answer_tokens))

    def finish(example: Example) -> Rationale:
        rationale = split_rollout(codec, *next(drawn), example.answer, credit or args.credit)
        if not max_answer_tokens:
            return rationale
        return rationale._replace(right=own_answer(codec, example, rationale.ids)["right"])
    return [[finish(example) for _ in range(rows)] for example in examples]


# ------------------------------------------------------------------------------ 3. question tree
class Tree(NamedTuple):
    """B questions with K rationales each, in one row of S tokens. Each prompt is computed once:

        tokens    x x x x | z1 z1 z1 y y | z2 z2 y y | ... | zK zK zK zK y
        position  0 1 2 3 | 4  5  6  7 8 | 4  5  6 7 | ... | 4  5  6  7  8

    A token attends to its prompt and, backwards, to its own branch. So one forward pass gives every
    log pi(z_k|x) and log pi(y|x+z_k), as K passes over x + z_k + y would.

    T of the tokens are scored: the hidden state at sources[t] predicts targets[t]. Their order is
    z_1 y_1 z_2 y_2 ..., where z_k includes what ended it."""

    ids: Tensor  # (1, S)
    position: Tensor  # (1, S)
    layout: Layout  # where the tokens go for attention
    sources: Tensor  # (T,)
    targets: Tensor  # (T,)
    temperature: Tensor  # (T,): that of sampling on z, 1 on y
    # z_start, y_start, end (N,): of the T, rationale n has z_start : y_start as its z and
    # y_start : end as its y.
    spans: tuple[Tensor, Tensor, Tensor]
    truncated: Tensor  # (N,) bool
    right: Tensor  # (N,) bool
    K: int


def tree_size(example: Example, group: list[Rationale]) -> int:
    """Tokens of a question and its rationales."""
    return len(example.x) + sum(one.context + len(one.y) - 1 for one in group)


def pack_tree(prompts: list[list[int]], groups: list[list[Rationale]], temperature: float,
              policy) -> Tree:
    """The tree of B prompts, each with its group of K rationales, on the policy's device."""
    ids, position, sources, targets, edges, trunks, branches = [], [], [], [], [0], [], []
    for x, group in zip(prompts, groups, strict=True):
        trunks.append((len(ids), len(x)))
        ids += x
        position += range(len(x))
        fork = len(ids) - 1  # the last token of x predicts the first of every branch
        for rationale in group:
            actions, y, context = rationale.actions, rationale.y, rationale.context
            tokens = (actions[:context] + y)[:-1]  # the last token predicts nothing
            branches.append((len(ids), len(tokens)))
            path = [fork, *range(len(ids), len(ids) + len(tokens))]
            sources += path[:len(actions)] + path[context:]
            targets += actions + y
            edges += [len(targets) - len(y), len(targets)]
            ids += tokens
            position += range(len(x), len(x) + len(tokens))
    layout = build_layout(trunks, branches, position, policy)
    padding = [0] * (len(layout.inverse) - len(ids))
    truncated, right = zip(*((one.truncated, bool(one.right)) for group in groups
                             for one in group))
    ids, position, sources, targets, edges, truncated, right = (
        torch.tensor(values).to(policy.device) for values in (
            ids + padding, position + padding, sources, targets, edges, truncated, right))
    by_span = torch.tensor([temperature, 1.0], device=policy.device).repeat(len(edges) // 2)
    temperatures = by_span.repeat_interleave(edges.diff(), output_size=len(targets))
    return Tree(ids[None], position[None], layout, sources, targets, temperatures,
                (edges[:-1:2], edges[1::2], edges[2::2]), truncated, right, len(groups[0]))


# ------------------------------------------------------------------------------ 4. the ELBO
def logprobs(policy: nn.Module, tree: Tree) -> Tensor:
    """(T,) log-probs of the tree's targets, nats. Becomes a method of the policy, `logprobs`."""
    policy.train(torch.is_grad_enabled())  # train mode allows activation checkpointing
    head = policy.get_output_embeddings().weight  # (V, D)
    layout = tree.layout.additive(head, policy.config)
    some, *_ = layout.branch_masks.values()  # transformers makes none of its own
    hidden = policy.model(input_ids=tree.ids, position_ids=tree.position, layout=layout,
                          attention_mask=some, use_cache=False).last_hidden_state[0]
    policy.eval()
    return token_logprobs(hidden[tree.sources], head, tree.targets,
                          tree.temperature * logits_divisor(policy.config))


def span_lengths(z_start: Tensor, y_start: Tensor, end: Tensor) -> Tensor:
    """Tokens of z_1, y_1, z_2, y_2, ...: (2 N,)."""
    return torch.stack([z_start, y_start], 1).flatten().diff(append=end[-1:])


@torch.no_grad()
def sum_spans(logp: Tensor, z_start: Tensor, y_start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of log-probs (T,) over each rationale's z and over its y: (N,) and (N,), nats."""
    lengths = span_lengths(z_start, y_start, end)
    return torch.segment_reduce(logp, "sum", lengths=lengths, initial=0).view(-1, 2).unbind(1)


def answer_reward(reward: str, logp: Tensor, spans: tuple[Tensor, ...], logp_y: Tensor,
                  right: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a reward says of each y, and how it rises with a token's log-prob (for mean-prob: with
    its probability): (N,) each."""
    if reward == "prob":  # arXiv 2505.21493
        return logp_y.exp(), logp_y.exp()
    if reward == "mean-prob":  # arXiv 2506.18254
        length = (spans[2] - spans[1]).clamp(min=1)
        return sum_spans(logp.exp(), *spans)[1] / length, 1 / length.to(logp_y)
    if reward == "correct":  # plain RLOO on a verifier's 0 or 1
        return right.to(logp_y), torch.zeros_like(logp_y)
    return logp_y, torch.ones_like(logp_y)


def elbo(r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Advantage and eq. 4's weights of grad log pi(z|x) and grad log pi(y|x+z), from rewards r:
    (B, K) each."""
    K = r.shape[1]
    advantage = (r - r.mean(1, keepdim=True)) * (K / (K - 1))  # = r_k - mean of the other K - 1
    return advantage, advantage, torch.ones_like(r)


def iwae(r: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same for the bound log mean_k exp r_k (arXiv 2503.19618), where beta is the exponent of
    pi_0 / pi. A_k is the bound minus the bound without rationale k. The answer term goes to
    rationale k by its share softmax(r)_k; of the gradient of log pi(z|x) in r_k, beta times that
    share is left."""
    K = r.shape[1]
    itself = torch.eye(K, device=r.device) > 0
    others = r[:, None].expand(-1, K, K).masked_fill(itself, -math.inf).logsumexp(2)
    advantage = r.logsumexp(1, keepdim=True) - math.log(K) - (others - math.log(K - 1))
    share = r.softmax(1)
    return advantage, K * (advantage - beta * share), K * share


@kernels.definition
@torch.no_grad()
def score_rationales(logp: Tensor, logp0: Tensor | None, z_start: Tensor, y_start: Tensor,
                     end: Tensor, K: int, beta: float, *, bound: str = "elbo",
                     reward: str = "logp", right: Tensor | None = None,
                     answer_weight: float = 1.0, penalty: Tensor | float = 0.0,
                     total: int | None = None) -> Scores:
    """Reward, advantage and token weights of N rationales, of which each K answer one question.

    logp, logp0 (T,): log-probs under the policy and under pi_0, nats; None: no KL. z_start,
    y_start, end (N,): as Tree.spans. `right` (N,): for the reward "correct". `penalty` (N,) is
    taken off the reward. `total`: rationales of the whole update (default N). On CUDA
    kernels/rationale_score.py does this in one launch.

    Raises ValueError for K < 2: a single rationale has no baseline."""
    if K < 2:
        raise ValueError(f"K = {K}: the leave-one-out baseline needs at least 2 rationales")
    spans = z_start, y_start, end
    logp_z, logp_y = sum_spans(logp, *spans)  # (N,) each
    logp0_z = None if logp0 is None else sum_spans(logp0, *spans)[0]
    gain, slope = answer_reward(reward, logp, spans, logp_y, right)  # (N,) each
    beta, log_ratio = (0.0, 0.0) if logp0 is None else (beta, logp_z - logp0_z)
    r = gain - beta * log_ratio - penalty  # (N,)
    # Only differences within a question count. Taking them first keeps float32's digits for them.
    group = r.view(-1, K)
    group = group - group.amax(1, keepdim=True)
    advantage, weight_z, weight_y = iwae(group, beta) if bound == "iwae" else elbo(group)
    weight_y = answer_weight * slope * weight_y.flatten()
    # Every token of z_k has the weight of grad log pi(z_k|x), every token of y that of its term.
    weights = torch.stack([weight_z.flatten(), weight_y], 1).flatten() / (total or len(end))
    lengths = span_lengths(*spans)  # (2 N,)
    token_weights = weights.repeat_interleave(lengths, output_size=len(logp))  # (T,)
    if reward == "mean-prob":
        is_y = torch.arange(len(lengths), device=logp.device) % 2 == 1
        on_y = is_y.repeat_interleave(lengths, output_size=len(logp))
        token_weights *= logp.exp().where(on_y, 1.0)
    return Scores(logp_z, logp0_z, logp_y, r, advantage.flatten(), token_weights)


@torch.no_grad()
def sft_weights(logp: Tensor, z_start: Tensor, y_start: Tensor, end: Tensor, total: int) -> Scores:
    """For rationales that were given, not sampled: the objective is log pi(z|x) + log pi(y|x+z),
    summed over tokens and averaged over `total` questions."""
    logp_z, logp_y = sum_spans(logp, z_start, y_start, end)
    token_weights = torch.full_like(logp, 1 / total)
    return Scores(logp_z, None, logp_y, logp_z + logp_y, torch.zeros_like(logp_y), token_weights)


def score(policy, reference, examples: list[Example], groups: list[list[Rationale]], args: Args,
          given: bool = False) -> tuple[Tensor, Scores]:
    """One forward pass of the policy, and one of another reference without gradient. Returns the
    (T,) log-probs, which carry the gradient, and the Scores of N rationales. `given`: not
    sampled."""
    tree = pack_tree([example.x for example in examples], groups, args.temperature, policy)
    total = args.questions * tree.K  # N of the whole update, however it is split
    another = not given and reference not in (None, policy)
    with torch.no_grad():
        logp0 = reference.logprobs(tree) if another else None  # (T,)
    logp = policy.logprobs(tree)  # (T,) log pi of every token of z and y
    if given:
        return logp, sft_weights(logp, *tree.spans, total)
    if reference is policy:
        logp0 = logp.detach()
    return logp, score_rationales(
        logp, logp0, *tree.spans, tree.K, args.beta, bound=args.bound, reward=args.reward,
        right=tree.right, answer_weight=args.answer_weight,
        penalty=args.truncation_penalty * tree.truncated, total=total)


# ------------------------------------------------------------------------------ 5. optimizer step
def learning_rate(step: int, args: Args) -> float:
    """Of update step + 1: a linear rise over --warmup updates, then a linear fall to 0."""
    remaining, decay = args.steps - step, max(1, args.steps - args.warmup)
    return args.lr * min(1.0, (step + 1) / (args.warmup + 1), remaining / decay)


def optimizer_step(policy, optimizer, step: int, args: Args) -> tuple[float, float]:
    """One step of AdamW on clipped gradients. Returns the norm before clipping, and the learning
    rate."""
    norm = nn.utils.clip_grad_norm_(policy.parameters(), args.grad_clip or math.inf)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if not math.isfinite(norm):
        raise UserError(f"update {step + 1}: the gradient is {norm}; {args.out} keeps its last"
                        f" state; {DIVERGENCE_HINT}")
    lr = learning_rate(step, args)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm, lr


# ------------------------------------------------------------------------------ 6. evaluation
def evaluation_batch(args: Args, k: int) -> int:
    """Questions at a time and process in an evaluation: as many sequences as in a rollout."""
    return max(1, args.questions * args.K // processes() // (1 + k))


@torch.no_grad()
def evaluate(policy, reference, codec: Codec, examples: list[Example], args: Args, k: int = 2,
             which: slice = slice(None)) -> list[dict]:
    """A record for each of some questions, the same however the work is split.

    text, said, right: the greedy reply, its answer, whether it is correct; samples: k >= 2 replies
    at --temperature, with the scores of training. A reply is right if z ends within L tokens and
    the gold answer follows."""
    max_answer_tokens = answer_limit(codec, examples)
    batch_size = evaluation_batch(args, k)
    mine, done = local_slice([*enumerate(examples)][which]), []

    def reply(example: Example, rationale: Rationale) -> dict:
        return own_answer(codec, example, rationale.ids) | dict(actions=len(rationale.actions))

    batches = tqdm(range(0, len(mine), batch_size), desc="evaluation", leave=False,
                   disable=not is_main_process() or len(mine) <= batch_size)
    with unsharded(policy, reference):
        for start in batches:
            question_ids, batch = zip(*mine[start:start + batch_size])
            replies = rollout(policy, codec, batch, question_ids, 0, args, k, max_answer_tokens,
                              greedy=True)
            for example, (greedy, *group) in zip(batch, replies):
                scored = score(policy, reference, [example], [group], args)
                [rows] = records(codec, [example], [group], *scored)
                samples = [row | reply(example, one) for row, one in zip(rows, group)]
                done.append(dict(question=example.question, gold=example.gold,
                                 options=example.options, **reply(example, greedy),
                                 samples=samples))
    return all_gather_list(done)


def evaluate_and_log(step: int, policy, reference, codec, held_out, args: Args) -> None:
    """Logs how well the policy does on the held-out questions."""
    done = evaluate(policy, reference, codec, held_out, args)
    greedy = float(np.mean([row["right"] for row in done]))
    sampled = float(np.mean([sample["right"] for row in done for sample in row["samples"]]))
    means = summary([row["samples"] for row in done])
    log(args, "evals", dict(step=step, split="held-out", n=len(done), greedy=greedy,
                            sampled=sampled, **means))
    log(args, "samples", dict(step=step, split="held-out", questions=done[:3]))
    if step == 0:
        print0(how_rationales_end(means))


# ------------------------------------------------------------------------------ 7. training
def log(args: Args, name: str, row: dict) -> None:
    append_jsonl(Path(args.out, f"{name}.jsonl"), row)
    track(name, row)


def draw_batch(train_set: list[Example], step: int, args: Args) -> list[Example]:
    """The questions of an update, the same on every rank. Each epoch has its own order."""
    size, first = len(train_set), step * args.questions
    places = [divmod(first + i, size) for i in range(args.questions)]  # (epoch, place in it)
    order = {epoch: np.random.default_rng((args.seed, epoch, 0, ORDER)).permutation(size)
             for epoch, _ in places}
    return [train_set[order[epoch][place]] for epoch, place in places]


def epochs_to_steps(epochs: float, size: int, questions: int) -> int:
    """Updates that visit `size` questions so many times. Exact: 0.1 is a tenth."""
    return math.ceil(Fraction(str(epochs)) * size / questions)


def set_length(args: Args, start: int) -> None:
    """Records how long the run is, and says so where --resume changes it."""
    if start > args.steps:
        raise UserError(f"--steps {args.steps}: {args.out} has {start} updates already; give more")
    if record_schedule(args, start):
        print0(f"from update {start + 1} on, the learning rate is that of a run of {args.steps}"
               f" updates: {learning_rate(start, args):.3g} at first")


def propose_rationales(policy, codec: Codec, examples: list[Example], step: int,
                       args: Args) -> list[list[Rationale]]:
    """Rationales of an update, [B][K], the same on every rank: sampled, or for SFT the gold one."""
    if args.objective == "sft":
        return [[gold_rationale(codec, example.z, example.answer)] for example in examples]
    mine, question_ids = local_slice(examples), local_slice(range(len(examples)))
    own = dict(max_answer_tokens=answer_limit(codec, examples), credit="reply")
    with unsharded(policy):
        return all_gather_list(rollout(policy, codec, mine, question_ids, step, args, args.K,
                                       **own if args.reward == "correct" else {}))


def pack_branches(prompts: list[list[int]], branches: list[list[list[int]]], policy) -> Tree:
    """A tree in which all of each branch is scored, as z: what check_equivalence compares."""
    groups = [[Rationale(z, z, len(z), [], len(z), False) for z in group] for group in branches]
    return pack_tree(prompts, groups, 1.0, policy)


def load(args: Args, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """--model with `logprobs` and this project's attention, which must give its own log-probs.
    Sets the precision of float32 products for the whole process."""
    torch.set_float32_matmul_precision(args.matmul_precision)
    model = load_model(args, device, dtype, logprobs)
    check_equivalence(model, pack_branches, args.model)
    return model


def load_policies(args: Args, device: torch.device) -> tuple:
    """The policy, whose trained weights are float32, and pi_0: the same weights, or those of
    --reference, frozen, in the dtype that computes. None where no KL needs it."""
    initial = dataclasses.replace(args, model=args.reference or args.model)
    check_same_shape(args, initial)
    policy = load(args, device, compute_dtype(device) if args.lora_rank else torch.float32)
    if args.objective == "sft" or args.beta == 0:
        return policy, None
    if args.lora_rank:
        return policy, FrozenBase(policy)
    return policy, load_model(initial, device, compute_dtype(device), logprobs)


def train(args: Args) -> None:
    """Algorithm 1 of the paper."""
    device, stop_signals = init_distributed(args.timeout), catch_stop_signals()
    kernels.use(args.kernels, UserError)
    codec, train_set, held_out = load_datasets(args)
    policy, reference = load_policies(args, device)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0, fused=True)
    init_run_dir(args)
    start, epoch = restore_checkpoint(args, policy, optimizer), args.questions / len(train_set)
    args.steps = args.steps or epochs_to_steps(args.epochs, len(train_set), args.questions)
    print0(f"{args.steps} updates of {args.questions} questions = {args.steps * epoch:.3g} epochs")
    set_length(args, start)
    start_tracker(args, start)
    if start == 0:
        evaluate_and_log(0, policy, reference, codec, held_out, args)

    sft = args.objective == "sft"
    progress = tqdm(range(start, args.steps), initial=start, total=args.steps,
                    disable=not is_main_process())
    for step in progress:
        seconds, rows = dict.fromkeys(("sample", "score", "backward", "step"), 0.0), []
        examples = draw_batch(train_set, step, args)  # B questions, the same on every rank

        # Sample K rationales per question from the current policy: z ~ pi(.|x).
        with timed(seconds, "sample"):
            groups = propose_rationales(policy, codec, examples, step + 1, args)  # [B][K]

        # One forward pass gives the reward and carries the gradient. This rank's micro-batches are
        # whole questions, a budget of tokens at a time.
        micro_batches = assign_micro_batches([*map(tree_size, examples, groups)], args.micro)
        for indices in micro_batches:
            batch, group = zip(*((examples[i], groups[i]) for i in indices))
            with timed(seconds, "score"):
                # logp (T,) nats, of every token of z and y; scores.reward and .advantage (N,) nats;
                # scores.token_weights (T,): A on tokens of z, 1 on tokens of y, over N.
                logp, scores = score(policy, reference, batch, group, args, given=sft)
            with timed(seconds, "backward"):
                loss = -(scores.token_weights * logp).sum()
                backward(loss, policy, last=indices is micro_batches[-1])
            rows += zip(indices, records(codec, batch, group, logp.detach(), scores))

        rows = [row for _, row in sorted(all_gather_list(rows), key=lambda pair: pair[0])]
        check_finite(examples, rows, step, args.out)
        with timed(seconds, "step"):
            grad_norm, lr = optimizer_step(policy, optimizer, step, args)

        step += 1
        means = summary(rows)
        log(args, "samples", dict(step=step, split="train", question=examples[0].question,
                                  samples=rows[0]))
        log(args, "metrics", dict(step=step, epoch=step * epoch, **means, grad_norm=grad_norm,
                                  lr=lr, **throughput(rows, seconds), peak_mem_gb=peak_memory()))
        progress.set_postfix({name: f"{means[key]:.2f}" for key, name in HEADLINES
                              if means[key] is not None})
        stop, last = any(all_gather_list([bool(stop_signals)])), step == args.steps
        if last or args.eval_every and step % args.eval_every == 0:
            evaluate_and_log(step, policy, reference, codec, held_out, args)
        if last or stop or args.save_every and step % args.save_every == 0:
            save_checkpoint(args, policy, optimizer, codec.tokenizer, step)
        if stop and not last:
            print0(f"stopped after update {step}: go on with --resume --out {args.out}")
            return
    print0(before_and_after(Path(args.out)))


# ------------------------------------------------------------------------------ 8. main
def parse(argv: list[str] | None) -> Args:
    return config.parse_args(Args, argv, PRESETS)


def run(argv: list[str] | None) -> None:
    args = parse(argv)
    if args.plan:
        print0(memory.plan(load_config(args), args, args.plan))
        return
    try:
        train(args)
    finally:
        stop_tracker()


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 1 after one sentence on stderr."""
    return run_cli("latro.py", lambda: run(argv), "--micro, --K, --L or --questions",
                   "--out keeps its last checkpoint: set that right, then --resume")


if __name__ == "__main__":
    exit_process(main())
