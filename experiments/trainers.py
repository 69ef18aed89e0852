"""The other trainers of peer.py: TRL's RLOOTrainer, and the procedure of the paper's released code.

Both train on given batches of questions, with the settings of a run of latro.py.
"""

from collections.abc import Callable
from importlib import import_module
from time import perf_counter

import torch
from torch import Tensor, nn

import latro  # before transformers: see kernels/__init__.py
import transformers
from benchmarks.rivals import Released
from benchmarks.work import PHASES, Workload
from harness.data import Example
from latro import Args, Rationale, split_rollout


# ------------------------------------------------------------------------------ both
class Record:
    """Seconds of each update by phase, and the weights after those that will be evaluated."""

    def __init__(self, args: Args):
        self.args, self.seconds, self.weights = args, [], {}

    def add(self, seconds: dict[str, float], policy: nn.Module) -> None:
        self.seconds.append(seconds)
        step, every = len(self.seconds), self.args.eval_every
        if step == self.args.steps or every and step % every == 0:
            self.weights[step] = {k: v.clone() for k, v in policy.state_dict().items()}


def where_z_ends(stops: list[list[int]], eos: list[int], ids: list[int]) -> tuple[int, int]:
    """How many ids are z and what ended it, and what did: as latro.sample_rationales says it."""
    matched = length = 0  # characters of the template, tokens of it
    for end, token in enumerate(ids, 1):
        found = stops[matched][token]
        length, matched = 1 if found < 0 else length + 1, abs(found)
        if matched == len(stops) - 1:
            return end, length
        if token in eos:
            return end, -1
    return len(ids), 0


def make_finish(codec, args: Args) -> Callable[[Example, list[int]], Rationale]:
    """Returns a function that makes a rationale of sampled ids, as latro.rollout does."""
    stops = codec.stops.tolist()

    def finish(example: Example, ids: list[int]) -> Rationale:
        end = where_z_ends(stops, codec.eos, ids)
        return split_rollout(codec, ids, *end, example.answer, args.credit)
    return finish


# ------------------------------------------------------------------------------ TRL
@torch.no_grad()
def answer_logprobs(policy: nn.Module, rows: list[tuple[list[int], list[int]]]) -> Tensor:
    """(N,) log-probs of the second part of each row given its first part, nats."""
    width = max(len(a + b) for a, b in rows)
    ids = torch.tensor([a + b + [0] * (width - len(a + b)) for a, b in rows])
    logits = policy(ids, use_cache=False).logits  # causal: no token attends to padding after it
    row, before, target = torch.tensor([(n, len(a) + t - 1, token) for n, (a, b) in enumerate(rows)
                                        for t, token in enumerate(b)]).T
    logp = logits[row, before].log_softmax(-1).gather(1, target[:, None])[:, 0]
    return torch.zeros(len(rows)).index_add(0, row, logp)


def make_reward(policy, codec, args: Args, examples: list[Example]) -> Callable:
    """TRL's reward function: log p(y|x+z) under the policy. `place`: a column of the data set."""
    finish = make_finish(codec, args)

    def log_likelihood(completion_ids: list[list[int]], place: list[int], **_) -> list[float]:
        rows = []
        for i, ids in zip(place, completion_ids, strict=True):
            one = finish(examples[i], ids)
            rows.append((examples[i].x + one.actions[:one.context], one.y))
        return answer_logprobs(policy, rows).tolist()
    return log_likelihood


class Clock(transformers.TrainerCallback):
    """Times updates: training_step, clipping and AdamW."""

    def __init__(self, record: Record):
        self.record = record

    def on_step_begin(self, *_, **__) -> None:
        self.start = perf_counter()

    def on_step_end(self, *_, model, **__) -> None:
        self.record.add(dict(update=perf_counter() - self.start), model)


def trl_trainer(args: Args, codec, batches: list[list[Example]], setting: dict, record: Record):
    """RLOOTrainer with the settings of a run of latro.py.

    One sampling call makes all rationales of an update, and stops at the template, whose last token
    counts as one more EOS. Advantages are not normalised, the KL is part of the reward, and
    nothing is divided by lengths; these are TRL's defaults. Without dropout, recomputation, mixed
    precision, logs, checkpoints or worker processes."""
    trl, datasets = import_module("trl"), import_module("datasets")
    examples, N = [example for batch in batches for example in batch], args.questions * args.K
    policy = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation=setting["attention"])
    policy.generation_config.eos_token_id = [*codec.eos, codec.template_after_z[-1]]
    settings = trl.RLOOConfig(
        output_dir=args.out, seed=args.seed, max_steps=args.steps, num_generations=args.K,
        max_completion_length=args.L, temperature=args.temperature, beta=args.beta,
        per_device_train_batch_size=setting["rows"], num_iterations=1,
        gradient_accumulation_steps=N // setting["rows"], shuffle_dataset=False,
        cache_implementation=setting["cache"], optim="adamw_torch_fused", learning_rate=args.lr,
        lr_scheduler_type="linear", warmup_steps=0, weight_decay=0.0, max_grad_norm=args.grad_clip,
        normalize_advantages=False, use_cpu=True, bf16=False, gradient_checkpointing=False,
        report_to="none", logging_strategy="no", save_strategy="no", disable_tqdm=True)
    prompts = [dict(prompt=codec.prompt(example.question), place=i)
               for i, example in enumerate(examples)]
    trainer = trl.RLOOTrainer(policy, make_reward(policy, codec, args, examples), settings,
                              processing_class=codec.tokenizer, callbacks=[Clock(record)],
                              train_dataset=datasets.Dataset.from_list(prompts))
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def train_trl(args: Args, codec, batches: list[list[Example]], setting: dict, record: Record):
    trl_trainer(args, codec, batches, setting, record).train()


# ------------------------------------------------------------------------------ released code
class Job(Workload):
    """What a Workload is to a loop of the benchmarks, with the toy's weights and questions."""

    def __init__(self, args: Args, codec):
        self.args, self.eos, self.make = args, codec.eos[0], make_finish(codec, args)
        self.policy, self.reference = latro.load_policies(args, torch.device("cpu"))
        self.policy.generation_config.eos_token_id = None
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=args.lr, weight_decay=0.0,
                                           fused=True)
        self.lengths = [args.L] * args.questions * args.K

    def cut_after_eos(self, rows: list[list[int]]) -> list[list[int]]:
        """The rows as they are: `finish` finds where z ends."""
        return rows

    def finish(self, rows: list[list[int]]) -> list[list[Rationale]]:
        drawn = iter(rows)
        return [[self.make(example, next(drawn)) for _ in range(self.args.K)]
                for example in self.batch]


class ReleasedUpdate(Released):
    def processors(self, use_uniform: bool) -> list:
        """None: lengths are not forced."""
        return []

    def update(self, step: int, batch: list[Example]) -> dict[str, float]:
        """Returns the seconds of an update by phase."""
        self.seconds, self.work.batch = dict.fromkeys(PHASES, 0.0), batch
        with self.phase("sample"):
            groups = self.work.finish(self.sample(use_uniform=False))
        self.add_gradient(groups)
        with self.phase("step"):
            latro.optimizer_step(self.work.policy, self.work.optimizer, step, self.work.args)
        return self.seconds


def train_released(args: Args, codec, batches: list[list[Example]], setting: dict, record: Record):
    torch.manual_seed(args.seed)
    loop = ReleasedUpdate(Job(args, codec))
    for step, batch in enumerate(batches):
        record.add(loop.update(step, batch), loop.work.policy)


TRAIN = {"TRL RLOOTrainer": train_trl, "released procedure": train_released}
