"""Other ways to do what our loop does, as their users would: generate, the released code, TRL."""

import math
from functools import cached_property, partial
from importlib import import_module

import torch
import transformers
from torch import Tensor, nn

from harness import distributed
from harness.memory import needs_activation_checkpointing
from kernels.reference import inverse_cdf_sample
from latro import Rationale

from .timing import device
from .work import Loop, Work


class Forced(transformers.LogitsProcessor):
    """Ends row i of `generate` with its lengths[i]-th token, not before; one of L tokens is cut.

    driven: by the tokens that sample_rationales draws from the same numbers."""

    def __init__(self, work: Work, driven: bool):
        self.eos, self.width = work.eos, None
        self.ends = torch.tensor([n if n < work.args.L else 0 for n in work.lengths],
                                 device=device())
        self.uniform = work.uniform.to(device()) if driven else None

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.width = self.width or ids.shape[1]  # of the prompts
        t = ids.shape[1] - self.width
        if self.uniform is not None:
            token = inverse_cdf_sample(scores, self.uniform[:, t], 1.0)
            return torch.full_like(scores, -math.inf).scatter(1, token[:, None], 0.0)
        scores[:, self.eos] = torch.where(self.ends == t + 1, 1e9, -math.inf)
        return scores


class Generate(Loop):
    """transformers' `generate` on K copies of each prompt."""

    def __init__(self, work: Work, **settings):
        super().__init__(work)
        self.config = transformers.GenerationConfig(**dict(
            max_new_tokens=work.args.L, do_sample=True, top_k=0, pad_token_id=0,
            eos_token_id=work.eos) | settings)

    def draw(self, driven: bool) -> list[list[int]]:
        w, prompts = self.work, [e.x for e in self.work.batch for _ in range(self.work.args.K)]
        width = max(map(len, prompts))
        ids = torch.tensor([[-1] * (width - len(x)) + x for x in prompts], device=device())
        w.attend("sdpa")
        with distributed.unsharded(w.policy):
            out = w.policy.generate(ids.clamp(min=0), attention_mask=(ids >= 0).long(),
                                    generation_config=self.config,
                                    logits_processor=[Forced(w, driven)])
        return w.finished((out if torch.is_tensor(out) else out.sequences)[:, width:].tolist())


class Released(Generate):
    """The released code's procedure: EOS disabled, all rows decode L tokens, scores of all steps
    are kept, then a loop looks for where z ends; five padded forwards a rationale, two of them with
    a backward pass, through float32 log-probs of all T x V. Its off-by-one, its rank-local penalty
    and its answer weight of 0 are left out, so that it has our gradient."""

    def __init__(self, work: Work):
        super().__init__(work, eos_token_id=None, output_scores=True, return_dict_in_generate=True)

    def learn(self, groups: list[list[Rationale]]) -> None:
        w, K, N = self.work, self.work.args.K, len(self.work.lengths)
        w.attend("sdpa")
        for e, group in zip(w.batch, groups):
            z = [(e.x, r.actions) for r in group]
            y = [(e.x + r.actions[:r.context], r.y) for r in group]
            with self.phase("score"), torch.no_grad():
                log_ratio = self.sums(w.policy, z) - self.sums(w.reference, z)
                reward = self.sums(w.policy, y) - w.args.beta * log_ratio
                A = (reward - reward.mean()) * K / (K - 1)
            with self.phase("backward"):
                (-(A * self.sums(w.policy, z)).sum() / N).backward()
                (-self.sums(w.policy, y).sum() / N).backward()

    def sums(self, model: nn.Module, rows: list[tuple[list[int], list[int]]]) -> Tensor:
        """(K,) log-probs of each row's second part given its first, nats."""
        width = max(len(a + b) for a, b in rows)
        ids = torch.tensor([a + b + [-1] * (width - len(a + b)) for a, b in rows], device=device())
        place = torch.arange(1, width, device=device())
        start, end = torch.tensor([(len(a), len(a + b)) for a, b in rows],
                                  device=device()).T[:, :, None]
        model.train(torch.is_grad_enabled())
        logits = model(ids.clamp(min=0), attention_mask=(ids >= 0).long(), use_cache=False).logits
        model.eval()
        logp = logits.float().log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None].clamp(min=0))
        return (logp[..., 0] * ((place >= start) & (place < end))).sum(1)


class Trl(Loop):
    """TRL's RLOOTrainer with `generate` (as of TRL 1.16): its own policy and its reference in
    float32 with autocast, K rows a micro-batch, its chunked log-probs. Its reward costs nothing and
    no y is scored. After one update by `train`, which sets it up, a run is what `train` repeats."""

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
        self.prompts = [dict(prompt=" ".join(map(word, e.x))) for e in w.batch]
        made = trl.RLOOTrainer(policy, self.reward, settings, processing_class=spelling(w.eos + 1),
                               train_dataset=Dataset.from_list(self.prompts))
        made.remove_callback(transformers.PrinterCallback)
        policy.generate = partial(self.inside, "sample", policy.generate)
        made._prepare_inputs = partial(self.inside, "score", made._prepare_inputs)
        self.forced = Forced(w, driven=False)
        made.train()
        return made

    def inside(self, phase: str, method, *args, **options):
        if phase == "sample":
            options["logits_processor"] = [self.forced]
        with self.phase(phase):
            return method(*args, **options)

    def reward(self, completion_ids: list[list[int]], **_) -> list[float]:
        self.drawn = completion_ids
        return [float(len(z)) for z in completion_ids]

    def owned(self) -> tuple:
        return self.trainer.model, self.trainer.ref_model, self.trainer.optimizer

    def run(self, driven: bool) -> list[list[int]]:
        trainer, rows = self.trainer, [p for p in self.prompts for _ in range(self.work.args.K)]
        self.forced = Forced(self.work, driven)
        with self.phase("step"):
            for _ in self.prompts:
                with self.phase("backward"):
                    trainer.training_step(trainer.model, rows, None)
            trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
        return self.drawn


def word(token: int) -> str:
    return f"<{token}>"  # no word is a part of another: special ones are looked for anywhere


def spelling(V: int) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer whose texts are words for token ids between spaces; the last one is EOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = Tokenizer(models.WordLevel({word(i): i for i in range(V)}, unk_token=word(0)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token=word(V - 1),
                                                pad_token=word(0))
