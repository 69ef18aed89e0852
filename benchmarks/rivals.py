"""Other ways to do what our loop does, as their users would: generate, continuous batching, the
released code, TRL."""

import math
import re
from functools import cached_property, partial
from importlib import import_module
from unittest.mock import patch

import torch
import transformers
from torch import Tensor, nn
from transformers.generation.continuous_batching import cb_logits_processors

from harness import distributed
from harness.memory import needs_activation_checkpointing
from kernels.reference import inverse_cdf_sample
from latro import Rationale

from .timing import device
from .work import Loop, Workload


class ForcedLengths(transformers.LogitsProcessor):
    """Makes row i of `generate` draw EOS as its lengths[i]-th token and not before. A row of L
    tokens gets no EOS.

    With `use_uniform` each row draws exactly the tokens that sample_rationales draws from
    work.uniform."""

    def __init__(self, work: Workload, use_uniform: bool):
        self.eos, self.prompt_width = work.eos, None
        self.eos_at = torch.tensor([n if n < work.args.L else 0 for n in work.lengths],
                                   device=device())
        self.uniform = work.uniform.to(device()) if use_uniform else None

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.prompt_width = self.prompt_width or ids.shape[1]
        t = ids.shape[1] - self.prompt_width
        if self.uniform is not None:
            token = inverse_cdf_sample(scores, self.uniform[:, t], 1.0)
            return torch.full_like(scores, -math.inf).scatter(1, token[:, None], 0.0)
        scores[:, self.eos] = torch.where(self.eos_at == t + 1, 1e9, -math.inf)
        return scores


class Generate(Loop):
    """transformers' `generate` on K copies of each prompt."""

    def __init__(self, work: Workload, **settings):
        super().__init__(work)
        self.config = transformers.GenerationConfig(**dict(
            max_new_tokens=work.args.L, do_sample=True, top_k=0, pad_token_id=0,
            eos_token_id=work.eos) | settings)

    def processors(self, use_uniform: bool) -> list[transformers.LogitsProcessor]:
        return [ForcedLengths(self.work, use_uniform)]

    def sample(self, use_uniform: bool) -> list[list[int]]:
        w = self.work
        prompts = [example.x for example in w.batch for _ in range(w.args.K)]
        width = max(map(len, prompts))
        ids = torch.tensor([[-1] * (width - len(x)) + x for x in prompts], device=device())
        w.set_attention("sdpa")
        with distributed.unsharded(w.policy):
            out = w.policy.generate(ids.clamp(min=0), attention_mask=(ids >= 0).long(),
                                    generation_config=self.config,
                                    logits_processor=self.processors(use_uniform))
        rows = out if torch.is_tensor(out) else out.sequences
        return w.cut_after_eos(rows[:, width:].tolist())


class ForcedLengthsByRequest(cb_logits_processors.ContinuousBatchingLogitsProcessor):
    """ForcedLengths for continuous batching. Request i, or its child k, is a rationale of question
    i % B: rows come and go, so each step is told which rationale and which token it draws."""

    supported_kwargs, ignored_kwargs = {}, ()

    def __init__(self, work: Workload):
        self.work, self.use_uniform = work, False
        self.uniform = work.uniform.flatten().to(device())
        self.is_end = torch.zeros(work.uniform.shape, dtype=torch.bool, device=device())
        for row, n in enumerate(work.lengths):
            self.is_end[row, n - 1] = n < work.args.L
        self.is_end = self.is_end.flatten()

    def row(self, request_id: str) -> int:
        """The rationale that a request samples; 0 for the requests of a warm-up."""
        B, K = len(self.work.batch), self.work.args.K
        if not (found := re.fullmatch(r"req_(\d+)(?:__child#(\d+))?", request_id)):
            return 0
        question, child = found.groups(K - 1)
        return int(question) % B * K + int(child)

    def fill_defaults(self, cells: Tensor) -> None:
        cells.zero_()

    def prepare_tensor_args(self, requests: list) -> Tensor:
        """Where each request's next token lies in (N, L), as one number."""
        tokens = [(self.row(r.state.request_id),
                   r.state.position_offset - len(r.state.initial_tokens)) for r in requests]
        cells = [row * self.work.args.L + t for row, t in tokens]
        return torch.tensor(cells, dtype=torch.int32).clamp(0, self.uniform.numel() - 1)

    def __call__(self, scores: Tensor, cells: Tensor) -> Tensor:
        cells = cells[:len(scores)].long()
        if self.use_uniform:
            token = inverse_cdf_sample(scores, self.uniform[cells], 1.0)
            return torch.full_like(scores, -math.inf).scatter(1, token[:, None], 0.0)
        scores[:, self.work.eos] = torch.where(self.is_end[cells], 1e9, -math.inf)
        return scores


# Only processors that transformers has converted get room for a number per request.
cb_logits_processors.CLASSIC_TO_CB_PROCESSORS_MAP[ForcedLengthsByRequest] = lambda p: p


class Continuous(Loop):
    """transformers' `generate_batch`, which batches continuously: the K rationales of a question
    share its prompt, and a row that has ended leaves the batch.

    Its fairest setting: the manager, with its cache and its CUDA graphs, is made once and stays;
    the cache holds all rows at once; everything else is as transformers decides, flash attention
    included where it is installed."""

    PAGE = 256  # tokens

    def __init__(self, work: Workload):
        super().__init__(work)
        args, longest = work.args, max(len(example.x) for example in work.batch)
        self.config = transformers.GenerationConfig(
            max_new_tokens=args.L, do_sample=True, top_k=0, pad_token_id=0, eos_token_id=work.eos,
            num_return_sequences=args.K)
        pages = math.ceil((longest + args.L) / self.PAGE) + 1
        self.settings = transformers.ContinuousBatchingConfig(
            page_size=self.PAGE, num_blocks=pages * len(work.lengths),
            per_request_processors=True)
        self.processor = ForcedLengthsByRequest(work)

    def sample(self, use_uniform: bool) -> list[list[int]]:
        """A rationale that is missing, since its request failed, has no tokens."""
        w, self.processor.use_uniform = self.work, use_uniform
        w.set_attention("sdpa")
        only_ours = transformers.LogitsProcessorList([self.processor])
        with (distributed.unsharded(w.policy),
              patch.object(w.policy, "_get_logits_processor", lambda config: only_ours)):
            out = w.policy.generate_batch(
                [example.x for example in w.batch], generation_config=self.config,
                continuous_batching_config=self.settings, persistent_manager=True)
        rows = [[] for _ in w.lengths]
        for request_id, result in out.items():
            rows[self.processor.row(request_id)] = list(result.generated_tokens)
        return w.cut_after_eos(rows)


class Released(Generate):
    """The procedure of the paper's released code. EOS is disabled, so all rows decode L tokens; the
    scores of all steps are kept; a loop then finds where each z ends. Each rationale takes five
    padded forward passes, two of them with a backward pass, through float32 log-probs of T x V.

    Left out, so that its gradient equals ours: its off-by-one error, its penalty that depends on
    the rank, and its answer weight of 0."""

    def __init__(self, work: Workload):
        super().__init__(work, eos_token_id=None, output_scores=True, return_dict_in_generate=True)

    def add_gradient(self, groups: list[list[Rationale]]) -> None:
        w, K, N = self.work, self.work.args.K, len(self.work.lengths)
        w.set_attention("sdpa")
        for example, group in zip(w.batch, groups):
            z = [(example.x, r.actions) for r in group]
            y = [(example.x + r.actions[:r.context], r.y) for r in group]
            with self.phase("score"), torch.no_grad():
                log_ratio = self.sum_logprobs(w.policy, z) - self.sum_logprobs(w.reference, z)
                reward = self.sum_logprobs(w.policy, y) - w.args.beta * log_ratio
                A = (reward - reward.mean()) * K / (K - 1)
            with self.phase("backward"):
                (-(A * self.sum_logprobs(w.policy, z)).sum() / N).backward()
                (-self.sum_logprobs(w.policy, y).sum() / N).backward()

    def sum_logprobs(self, model: nn.Module, rows: list[tuple[list[int], list[int]]]) -> Tensor:
        """(K,) log-probs of the second part of each row given its first part, nats."""
        width = max(len(a + b) for a, b in rows)
        ids = torch.tensor([a + b + [-1] * (width - len(a + b)) for a, b in rows], device=device())
        position = torch.arange(1, width, device=device())
        start, end = torch.tensor([(len(a), len(a + b)) for a, b in rows],
                                  device=device()).T[:, :, None]
        model.train(torch.is_grad_enabled())
        logits = model(ids.clamp(min=0), attention_mask=(ids >= 0).long(), use_cache=False).logits
        model.eval()
        logp = logits.float().log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None].clamp(min=0))
        return (logp[..., 0] * ((position >= start) & (position < end))).sum(1)


class Trl(Loop):
    """TRL's RLOOTrainer with `generate` (as of TRL 1.16). It has its own policy and reference in
    float32 with autocast, K rows per micro-batch, and chunked log-probs. Its reward costs nothing
    and it scores no y.

    The trainer's `train` does one update, which sets everything up. After that a run is what
    `train` repeats for each update."""

    @cached_property
    def trainer(self):
        from datasets import Dataset
        trl, w, cuda = import_module("trl"), self.work, device() == "cuda"
        policy = transformers.AutoModelForCausalLM.from_pretrained(w.folder.name,
                                                                   dtype=torch.float32)
        recompute = needs_activation_checkpointing(policy.config, w.args, 1, w.policy.device)
        settings = trl.RLOOConfig(
            output_dir=w.folder.name, num_generations=w.args.K, max_completion_length=w.args.L,
            per_device_train_batch_size=w.args.K, gradient_accumulation_steps=len(w.batch),
            beta=w.args.beta, top_k=0, learning_rate=0.0, max_steps=1, bf16=cuda, use_cpu=not cuda,
            gradient_checkpointing=recompute,
            shuffle_dataset=False, report_to="none", save_strategy="no", logging_strategy="no",
            disable_tqdm=True)
        self.prompts = [dict(prompt=" ".join(map(word, example.x))) for example in w.batch]
        trainer = trl.RLOOTrainer(policy, self.reward, settings,
                                  processing_class=word_tokenizer(w.eos + 1),
                                  train_dataset=Dataset.from_list(self.prompts))
        trainer.remove_callback(transformers.PrinterCallback)
        policy.generate = partial(self.call_in_phase, "sample", policy.generate)
        trainer._prepare_inputs = partial(self.call_in_phase, "score", trainer._prepare_inputs)
        self.processor = ForcedLengths(w, use_uniform=False)
        trainer.train()
        return trainer

    def call_in_phase(self, phase: str, method, *args, **options):
        if phase == "sample":
            options["logits_processor"] = [self.processor]
        with self.phase(phase):
            return method(*args, **options)

    def reward(self, completion_ids: list[list[int]], **_) -> list[float]:
        """Keeps the ids that TRL has sampled."""
        self.sampled = completion_ids
        return [float(len(ids)) for ids in completion_ids]

    def models_and_optimizer(self) -> tuple:
        return self.trainer.model, self.trainer.ref_model, self.trainer.optimizer

    def run(self, use_uniform: bool) -> list[list[int]]:
        trainer, rows = self.trainer, [p for p in self.prompts for _ in range(self.work.args.K)]
        self.processor = ForcedLengths(self.work, use_uniform)
        with self.phase("step"):
            for _ in self.prompts:
                with self.phase("backward"):
                    trainer.training_step(trainer.model, rows, None)
            trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
        return self.sampled


def word(token: int) -> str:
    """A token id as text. The brackets keep each word from being a part of another, since special
    tokens are searched for inside words."""
    return f"<{token}>"


def word_tokenizer(V: int) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer for texts of such words, separated by spaces. The last of its V tokens is EOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = Tokenizer(models.WordLevel({word(i): i for i in range(V)}, unk_token=word(0)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token=word(V - 1),
                                                pad_token=word(0))
