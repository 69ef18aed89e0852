"""What the loops of a benchmark share: models of real shapes, questions, forced lengths, our loop.

Models have the shapes of real ones and random weights, so nothing that they write ends by itself.
Ends are forced, the same for every candidate: after a log-normal number of tokens, median 0.4 L;
about one rationale in sixteen is cut at L. The vocabulary's last token is EOS.
"""

import argparse
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from tempfile import TemporaryDirectory
from time import perf_counter
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from torch import Tensor

import latro
from harness import distributed
from harness.data import Example
from harness.memory import Shape
from latro import Rationale, sample_rationales, split_rollout, tree_size

from .timing import device

SHAPES = {
    "SmolLM2-135M": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                         num_attention_heads=9, num_key_value_heads=3, vocab_size=49152),
    "Llama-3.2-1B": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                         num_attention_heads=32, num_key_value_heads=8, vocab_size=128256),
    "Llama-3.1-8B": dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
                         num_hidden_layers=8,  # of 32: two policies with Adam fit into 141 GB
                         num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False),
    "toy": dict(hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=4, vocab_size=163)}
MEDIAN, SPREAD = 0.4, 0.6  # of a rationale's length, in L; the deviation of its logarithm
PROMPTS, TOY_PROMPTS = (60, 200), (24, 56)  # tokens: GSM8K's, the toy's
TEMPLATE, ANSWER = 4, 3  # tokens of y: what joins it to z, the answer with its EOS
LIKELY = 0.9  # numbers below it never draw EOS, which has the last place in the distribution
PHASES = "sample", "score", "backward", "step"


class Work:
    """What the candidates of a table share: models, questions, lengths.

    policy    as latro.train has it; to sample only, bare weights in the dtype that computes
    batch     questions: random prompts and answers
    lengths   (N,) tokens of each rationale, its EOS included; one of L tokens has been cut
    uniform   (N, L): makes `sample` draw rationales of just these lengths
    optimizer None where nothing is trained; else its rate is 0, or EOS might become likely"""

    def __init__(self, model: str, args: argparse.Namespace, train: bool):
        self.folder, self.name, place = TemporaryDirectory(), model, torch.device(device())
        self.args = latro.Args(**(latro.PRESETS["toy"] if model == "toy" else {}) | dict(
            model=self.folder.name, questions=args.questions, K=args.K, L=args.L, steps=1, lr=0.0))
        self.dtype = distributed.compute_dtype(place)
        self.save(place)
        self.policy = latro.load_model(self.args, place, torch.float32 if train else self.dtype,
                                       latro.logprobs)
        self.reference = (latro.load_model(self.args, place, self.dtype, latro.logprobs)
                          if train else None)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=0.0, weight_decay=0.0,
                                           fused=True) if train else None
        self.shape, self.eos = Shape(self.policy.config, self.args, 1), self.policy.vocab_size - 1
        self.invent(args.questions, args.K, args.L)

    def save(self, place: torch.device) -> None:
        """A model of random weights, as a directory."""
        config = transformers.LlamaConfig(**dict(tie_word_embeddings=True) | SHAPES[self.name],
                                          max_position_embeddings=2**17, bos_token_id=None,
                                          eos_token_id=None)
        torch.manual_seed(0)
        with place:
            random = transformers.AutoModelForCausalLM.from_config(config, dtype=self.dtype)
        random.save_pretrained(self.folder.name)

    def invent(self, B: int, K: int, L: int) -> None:
        """Questions and lengths, always the same."""
        rng = np.random.default_rng(0)

        def ids(n: int) -> list[int]:
            return rng.integers(self.eos, size=n).tolist()
        few, many = TOY_PROMPTS if self.name == "toy" else PROMPTS
        self.batch = [Example("", "", ids(n), [*ids(ANSWER - 1), self.eos], [])
                      for n in rng.integers(few, many, size=B, endpoint=True)]
        lengths = np.ceil(MEDIAN * L * rng.lognormal(0, SPREAD, B * K)).clip(1, L).astype(int)
        uniform = LIKELY * rng.random((B * K, L))
        uniform[lengths < L, lengths[lengths < L] - 1] = 1.0
        self.lengths, self.uniform = lengths.tolist(), torch.tensor(uniform)

    def finished(self, rows: list[list[int]]) -> list[list[int]]:
        """Sampled rows up to their EOS."""
        return [z[:z.index(self.eos) + 1] if self.eos in z else z for z in rows]

    def groups(self, drawn: Iterable[list[int]]) -> list[list[Rationale]]:
        """What was drawn as K finished rationales a question."""
        template, z = [*range(TEMPLATE)], iter(drawn)
        codec = SimpleNamespace(template_after_z=template, template_at_start=template)

        def finish(ids: list[int], answer: list[int]) -> Rationale:
            return split_rollout(codec, ids, len(ids), -(ids[-1] == self.eos), answer, "answer")
        return [[finish(next(z), e.answer) for _ in range(self.args.K)] for e in self.batch]

    def made_up(self) -> list[list[Rationale]]:
        """Rationales of the forced lengths that no model has written."""
        rng = np.random.default_rng(1)
        drawn = (rng.integers(self.eos, size=n).tolist() for n in self.lengths)
        return self.groups(z if len(z) == self.args.L else [*z[:-1], self.eos] for z in drawn)

    def attend(self, attention: str) -> None:
        for model in filter(None, (self.policy, self.reference)):
            model.set_attn_implementation(attention)

    def bytes(self) -> float:
        """Bytes that decoding has to read: the weights once per token of the longest row after its
        first, and the keys and values of each row that still runs."""
        rows = zip((e.x for e in self.batch for _ in range(self.args.K)), self.lengths)
        seen = sum((n - 1) * (len(x) + n / 2) for x, n in rows)
        each = torch.finfo(self.dtype).bits // 8
        return each * ((max(self.lengths) - 1) * self.weights() + seen * self.token())

    def weights(self) -> int:
        """Numbers that a step reads of them: of an embedding that is not the head, next to none."""
        tied = self.policy.config.tie_word_embeddings
        return self.shape.parameters - (0 if tied else self.shape.V * self.shape.D)

    def token(self) -> int:
        """Numbers that the cache holds of a token."""
        return self.shape.layers * 2 * self.shape.key_width

    def flops(self) -> float:
        """Of a forward pass that does nothing twice: each prompt once, the head for what is scored,
        attention where a token sees another."""
        s, tokens, pairs, scored = self.shape, 0, 0, 0
        for e, group in zip(self.batch, self.made_up()):
            x, branches = len(e.x), [r.context + len(r.y) - 1 for r in group]
            tokens += x + sum(branches)
            pairs += x * (x + 1) / 2 + sum(n * x + n * (n + 1) / 2 for n in branches)
            scored += sum(len(r.actions + r.y) for r in group)
        blocks = s.layers * (2 * s.block_parameters * tokens + 4 * s.query_width * pairs)
        return blocks + 2 * s.V * s.D * scored


class Loop:
    """A candidate. Each call is a whole run, whose seconds by phase go to `runs`."""

    def __init__(self, work: Work):
        self.work, self.runs, self.peak = work, [], 0.0
        self.seconds, self.open, self.last = dict.fromkeys(PHASES, 0.0), [], 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time inside counts for this phase, except that of a phase within it."""
        self.tick()
        self.open.append(name)
        try:
            yield
        finally:
            self.tick()
            self.open.pop()

    def tick(self) -> None:
        if device() == "cuda":
            torch.cuda.synchronize()
        now = perf_counter()
        if self.open:
            self.seconds[self.open[-1]] += now - self.last
        self.last = now

    def __call__(self, driven: bool = False) -> list[list[int]]:
        """The ids of all rationales. The peak is that of this candidate: what other candidates keep
        in memory is subtracted."""
        self.seconds = dict.fromkeys(PHASES if self.work.optimizer else PHASES[:1], 0.0)
        if self.work.optimizer:
            self.work.optimizer.zero_grad()  # should a run have broken off
        if device() == "cuda":
            others = torch.cuda.memory_allocated() - self.kept()
            torch.cuda.reset_peak_memory_stats()
        drawn = self.run(driven)
        if device() == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() - others)
        self.runs.append(self.seconds)
        return drawn

    def owned(self) -> tuple:
        """Models and optimizer."""
        return self.work.policy, self.work.reference, self.work.optimizer

    def kept(self) -> int:
        """Bytes."""
        *models, optimizer = self.owned()
        states = optimizer.state.values() if optimizer else ()
        return sum(t.nbytes for t in chain(*(m.parameters() for m in models if m),
                                           *(state.values() for state in states)))

    def run(self, driven: bool) -> list[list[int]]:
        with self.phase("sample"):
            drawn = self.draw(driven)
        if self.work.optimizer:
            self.learn(self.work.groups(drawn))
            with self.phase("step"):
                latro.optimizer_step(self.work.policy, self.work.optimizer, 0, self.work.args)
        return drawn

    def gradient(self) -> list[Tensor]:
        """The gradient of the first question for the head, the first block and the last."""
        policy = self.work.policy
        self.learn(self.work.made_up()[:1])
        blocks = policy.model.layers[0], policy.model.layers[-1]
        some = policy.get_output_embeddings().weight, *(p for b in blocks for p in b.parameters())
        grads = [getattr(p.grad, "full_tensor", lambda g=p.grad: g)().cpu() for p in some]
        self.work.optimizer.zero_grad()
        return grads


class Ours(Loop):
    """The loop of latro.train."""

    def draw(self, driven: bool) -> list[list[int]]:
        w = self.work
        w.attend("latro")
        with distributed.unsharded(w.policy):
            drawn = sample_rationales(w.policy, [e.x for e in w.batch], [], [w.eos], w.args.K,
                                      w.args.L, w.uniform)
            return [ids for ids, *_ in drawn]

    def learn(self, groups: list[list[Rationale]]) -> None:
        w = self.work
        w.attend("latro")
        sizes = [*map(tree_size, w.batch, groups)]
        for indices in distributed.assign_micro_batches(sizes, w.args.micro):
            examples, group = zip(*((w.batch[i], groups[i]) for i in indices))
            with self.phase("score"):
                logp, scores = latro.score(w.policy, w.reference, examples, group, w.args)
            with self.phase("backward"):
                distributed.backward(-(scores.token_weights * logp).sum(), w.policy)
