"""What all candidates of a whole loop share: a model, questions and lengths; and our own loop.

The models have the shapes of real ones and random weights, so their rationales would not end by
themselves. Lengths are forced instead, the same for every candidate: log-normal with median 0.4 L,
so that about one rationale in sixteen is cut at L. The last token of the vocabulary is EOS.
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
from torch import Tensor, nn

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
MEDIAN, SPREAD = 0.4, 0.6  # median length of a rationale in L; standard deviation of its logarithm
PROMPT_TOKENS, TOY_PROMPT_TOKENS = (60, 200), (24, 56)  # least and most: as in GSM8K, in the toy
TEMPLATE_TOKENS, ANSWER_TOKENS = 4, 3  # of y; the answer includes EOS
BELOW_EOS = 0.9  # uniform numbers below it never draw EOS, which is last in the distribution
PHASES = "sample", "score", "backward", "step"


class Workload:
    """What the candidates of a table share: models, questions, lengths.

    policy     as latro.train has it; without training, plain weights in the dtype that computes
    reference  as latro.train has it; None without training
    batch      questions: random prompts and answers
    lengths    (N,) tokens of each rationale, EOS included; one of L tokens has been cut
    uniform    (N, L) numbers for sample_rationales that give rationales of exactly these lengths
    optimizer  None without training. Its learning rate is 0, or EOS might become likely

    `changed`: other sizes than the model's own. `prompt_tokens`: least and most of a question."""

    def __init__(self, model: str, args: argparse.Namespace, train: bool,
                 changed: dict | None = None, prompt_tokens: tuple[int, int] | None = None):
        self.sizes = SHAPES[model] | (changed or {})
        self.folder, place = TemporaryDirectory(), torch.device(device())
        self.args = latro.Args(**(latro.PRESETS["toy"] if model == "toy" else {}) | dict(
            model=self.folder.name, questions=args.questions, K=args.K, L=args.L, steps=1, lr=0.0))
        self.dtype = distributed.compute_dtype(place)
        self.save_random_model(place)
        self.policy = latro.load_model(self.args, place, torch.float32 if train else self.dtype,
                                       latro.logprobs)
        self.reference = (latro.load_model(self.args, place, self.dtype, latro.logprobs)
                          if train else None)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=0.0, weight_decay=0.0,
                                           fused=True) if train else None
        self.shape, self.eos = Shape(self.policy.config, self.args, 1), self.policy.vocab_size - 1
        self.draw_questions(args.questions, args.K, args.L, prompt_tokens or (
            TOY_PROMPT_TOKENS if model == "toy" else PROMPT_TOKENS))

    def save_random_model(self, place: torch.device) -> None:
        """Writes a model of random weights to the folder."""
        config = transformers.LlamaConfig(**dict(tie_word_embeddings=True) | self.sizes,
                                          max_position_embeddings=2**17, bos_token_id=None,
                                          eos_token_id=None)
        torch.manual_seed(0)
        with place:
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=self.dtype)
        model.save_pretrained(self.folder.name)

    def draw_questions(self, B: int, K: int, L: int, prompt_tokens: tuple[int, int]) -> None:
        """Draws questions, lengths and uniform numbers, always the same."""
        rng = np.random.default_rng(0)

        def random_ids(n: int) -> list[int]:
            return rng.integers(self.eos, size=n).tolist()
        self.batch = [
            Example("", "", random_ids(n), [*random_ids(ANSWER_TOKENS - 1), self.eos], [])
            for n in rng.integers(*prompt_tokens, size=B, endpoint=True)]
        lengths = np.ceil(MEDIAN * L * rng.lognormal(0, SPREAD, B * K)).clip(1, L).astype(int)
        uniform = BELOW_EOS * rng.random((B * K, L))
        uniform[lengths < L, lengths[lengths < L] - 1] = 1.0
        self.lengths, self.uniform = lengths.tolist(), torch.tensor(uniform)

    def cut_after_eos(self, rows: list[list[int]]) -> list[list[int]]:
        """Sampled rows up to and including EOS."""
        return [ids[:ids.index(self.eos) + 1] if self.eos in ids else ids for ids in rows]

    def finish(self, rows: Iterable[list[int]]) -> list[list[Rationale]]:
        """Sampled rows as rationales, [B][K]."""
        template, rows = [*range(TEMPLATE_TOKENS)], iter(rows)
        codec = SimpleNamespace(template_after_z=template, template_at_start=template)

        def rationale(ids: list[int], answer: list[int]) -> Rationale:
            stop_reason = -1 if ids[-1] == self.eos else 0
            return split_rollout(codec, ids, len(ids), stop_reason, answer, "answer")
        return [[rationale(next(rows), example.answer) for _ in range(self.args.K)]
                for example in self.batch]

    def random_rationales(self) -> list[list[Rationale]]:
        """[B][K] rationales of the forced lengths, made of random tokens."""
        rng = np.random.default_rng(1)
        rows = (rng.integers(self.eos, size=n).tolist() for n in self.lengths)
        return self.finish(ids if len(ids) == self.args.L else [*ids[:-1], self.eos]
                           for ids in rows)

    def set_attention(self, attention: str) -> None:
        for model in (self.policy, self.reference):
            if model is not None:
                model.set_attn_implementation(attention)

    def bytes_to_decode(self) -> float:
        """Bytes that decoding must read: the weights once for each token of the longest row after
        its first, and the keys and values of each row that is still running."""
        prompts = [example.x for example in self.batch for _ in range(self.args.K)]
        cached_tokens = sum((n - 1) * (len(x) + n / 2) for x, n in zip(prompts, self.lengths))
        steps, itemsize = max(self.lengths) - 1, torch.finfo(self.dtype).bits // 8
        return itemsize * (steps * self.weights_per_step()
                           + cached_tokens * self.cache_numbers_per_token())

    def weights_per_step(self) -> int:
        """Weights that a decoding step reads. An embedding that is not also the head does not
        count: only a few of its rows are read."""
        tied = self.policy.config.tie_word_embeddings
        return self.shape.parameters - (0 if tied else self.shape.V * self.shape.D)

    def cache_numbers_per_token(self) -> int:
        return self.shape.layers * 2 * self.shape.key_width

    def forward_flops(self) -> float:
        """FLOPs of a forward pass that computes nothing twice: each prompt once, the head for the
        scored tokens, attention only between tokens that attend to each other."""
        s, tokens, pairs, scored = self.shape, 0, 0, 0
        for example, group in zip(self.batch, self.random_rationales()):
            x, branches = len(example.x), [r.context + len(r.y) - 1 for r in group]
            tokens += x + sum(branches)
            pairs += x * (x + 1) / 2 + sum(n * x + n * (n + 1) / 2 for n in branches)
            scored += sum(len(r.actions + r.y) for r in group)
        blocks = 2 * s.used_by_a_token * tokens + s.layers * 4 * s.query_width * pairs
        return blocks + 2 * s.V * s.D * scored


class Loop:
    """A candidate. Each call is a complete run; its seconds by phase are appended to `runs`.

    A subclass defines `sample`, which returns the ids of all N rationales, and for training
    `add_gradient`, which computes the gradient; or it overrides `run`."""

    def __init__(self, work: Workload):
        self.work, self.runs, self.peak = work, [], 0.0  # peak: bytes
        self.seconds, self.open_phases, self.last_tick = dict.fromkeys(PHASES, 0.0), [], 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time inside for this phase, except for that of a phase within it."""
        self.tick()
        self.open_phases.append(name)
        try:
            yield
        finally:
            self.tick()
            self.open_phases.pop()

    def tick(self) -> None:
        """Adds the time since the last tick to the innermost open phase."""
        if device() == "cuda":
            torch.cuda.synchronize()
        now = perf_counter()
        if self.open_phases:
            self.seconds[self.open_phases[-1]] += now - self.last_tick
        self.last_tick = now

    def __call__(self, use_uniform: bool = False) -> list[list[int]]:
        """Runs once and returns the ids of all rationales. With `use_uniform` every candidate draws
        its tokens by work.uniform, so that all of them must draw the same.

        The peak is that of this candidate: what others keep in memory is subtracted."""
        training = self.work.optimizer is not None
        self.seconds = dict.fromkeys(PHASES if training else PHASES[:1], 0.0)
        if training:
            self.work.optimizer.zero_grad()  # an earlier run may have failed midway
        if device() == "cuda":
            others = torch.cuda.memory_allocated() - self.resident_bytes()
            torch.cuda.reset_peak_memory_stats()
        rows = self.run(use_uniform)
        if device() == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() - others)
        self.runs.append(self.seconds)
        return rows

    def models_and_optimizer(self) -> tuple:
        """Policy, reference and optimizer that this candidate uses."""
        return self.work.policy, self.work.reference, self.work.optimizer

    def resident_bytes(self) -> int:
        """Bytes that this candidate's models and optimizer take between runs."""
        *models, optimizer = self.models_and_optimizer()
        states = optimizer.state.values() if optimizer else ()
        return sum(t.nbytes for t in chain(*(m.parameters() for m in models if m),
                                           *(state.values() for state in states)))

    def run(self, use_uniform: bool) -> list[list[int]]:
        with self.phase("sample"):
            rows = self.sample(use_uniform)
        if self.work.optimizer is not None:
            self.add_gradient(self.work.finish(rows))
            with self.phase("step"):
                latro.optimizer_step(self.work.policy, self.work.optimizer, 0, self.work.args)
        return rows

    def gradient_to_compare(self) -> list[Tensor]:
        """The gradient of the first question, for the head and the first and last block."""
        policy = self.work.policy
        self.add_gradient(self.work.random_rationales()[:1])
        blocks = policy.model.layers[0], policy.model.layers[-1]
        parameters = [policy.get_output_embeddings().weight,
                      *(p for block in blocks for p in block.parameters())]
        gradients = [unsharded_gradient(p).cpu() for p in parameters]
        self.work.optimizer.zero_grad()
        return gradients


def unsharded_gradient(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


class Ours(Loop):
    """The loop of latro.train."""

    def sample(self, use_uniform: bool) -> list[list[int]]:
        """Always draws by work.uniform: it forces the lengths."""
        w = self.work
        w.set_attention("latro")
        no_template = torch.zeros(2, w.eos + 1, dtype=torch.int8)
        with distributed.unsharded(w.policy):
            sampled = sample_rationales(w.policy, [example.x for example in w.batch], no_template,
                                        [w.eos], w.args.K, w.args.L, w.uniform)
            return [ids for ids, *_ in sampled]

    def add_gradient(self, groups: list[list[Rationale]]) -> None:
        w = self.work
        w.set_attention("latro")
        sizes = [*map(tree_size, w.batch, groups)]
        for indices in distributed.assign_micro_batches(sizes, w.args.micro):
            examples, group = zip(*((w.batch[i], groups[i]) for i in indices))
            with self.phase("score"):
                logp, scores = latro.score(w.policy, w.reference, examples, group, w.args)
            with self.phase("backward"):
                distributed.backward(-(scores.token_weights * logp).sum(), w.policy)
