"""What is timed of whole loops: K rationales for each of some questions, an update of the policy.

Models have the shapes of real ones and random weights, so nothing that they write ends by itself.
Ends are forced, the same for every candidate: after a log-normal number of tokens, median 0.4 L;
about one rationale in sixteen is cut at L. The vocabulary's last token is EOS.
"""

import argparse, math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache, cached_property, partial
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from multiprocessing import get_context
from tempfile import TemporaryDirectory
from time import perf_counter
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn

from .. import Example, Problem, Rationale, conclude, pick_tokens, sample, tree_size
from ..planner import FLOPS, Shape
from ..sampler import Decoder, Recorded
from .operations import Tasks, uncompilable
from .timing import FLOOR, OURS, Task, device, measure, quartiles, relative

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
        import latro
        self.folder, self.name, place = TemporaryDirectory(), model, torch.device(device())
        self.args = latro.Args(**(latro.PRESETS["toy"] if model == "toy" else {}) | dict(
            model=self.folder.name, questions=args.questions, K=args.K, L=args.L, steps=1, lr=0.0))
        self.dtype = latro.compute_dtype(place)
        self.save(place)
        self.policy = latro.load(self.args, place, torch.float32 if train else self.dtype)
        self.reference = latro.load(self.args, place, self.dtype) if train else None
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
        codec = SimpleNamespace(join=template, lead=template)

        def finish(ids: list[int], answer: list[int]) -> Rationale:
            return conclude(codec, ids, len(ids), -(ids[-1] == self.eos), answer, "answer")
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
        """That decoding has to read: the weights for every token of the longest row behind its
        first, and the keys and values of each row that still runs, as many as it has."""
        rows = zip((e.x for e in self.batch for _ in range(self.args.K)), self.lengths)
        seen = sum((n - 1) * (len(x) + n / 2) for x, n in rows)
        each = torch.finfo(self.dtype).bits // 8
        return each * ((max(self.lengths) - 1) * self.weights() + seen * self.token())

    def weights(self) -> int:
        """Numbers that a step reads of them: of an embedding that is not the head, next to none."""
        tied = self.policy.config.tie_word_embeddings
        return self.shape.n - (0 if tied else self.shape.V * self.shape.D)

    def token(self) -> int:
        """Numbers that the cache holds of a token."""
        return self.shape.layers * 2 * self.shape.G

    def flops(self) -> float:
        """Of a forward pass that does nothing twice: each prompt once, the head for what is scored,
        attention where a token sees another."""
        s, tokens, pairs, scored = self.shape, 0, 0, 0
        for e, group in zip(self.batch, self.made_up()):
            x, branches = len(e.x), [r.context + len(r.y) - 1 for r in group]
            tokens += x + sum(branches)
            pairs += x * (x + 1) / 2 + sum(n * x + n * (n + 1) / 2 for n in branches)
            scored += sum(len(r.actions + r.y) for r in group)
        return s.layers * (2 * s.block * tokens + 4 * s.H * pairs) + 2 * s.V * s.D * scored


class Forced(transformers.LogitsProcessor):
    """Ends row i of `generate` with its lengths[i]-th token, not before; one of L tokens is cut.

    driven: by the very tokens that `sample` draws from the same numbers."""

    def __init__(self, work: Work, driven: bool):
        self.eos, self.width = work.eos, None
        self.ends = torch.tensor([n if n < work.args.L else 0 for n in work.lengths],
                                 device=device())
        self.uniform = work.uniform.to(device()) if driven else None

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.width = self.width or ids.shape[1]  # of the prompts
        t = ids.shape[1] - self.width
        if self.uniform is not None:
            token = pick_tokens(scores, self.uniform[:, t], 1.0)
            return torch.full_like(scores, -math.inf).scatter(1, token[:, None], 0.0)
        scores[:, self.eos] = torch.where(self.ends == t + 1, 1e9, -math.inf)
        return scores


class Loop:
    """A candidate. Each call is a whole run, whose seconds by phase go to `runs`."""

    def __init__(self, work: Work):
        self.work, self.runs, self.peak = work, [], 0.0
        self.seconds, self.open, self.last = dict.fromkeys(PHASES, 0.0), [], 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens inside belongs to the phase, but for what a phase inside it claims."""
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
        """The ids of all rationales; the peak is that of a run alone, beside what it needs to keep:
        other candidates keep models too."""
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
        import latro
        with self.phase("sample"):
            drawn = self.draw(driven)
        if self.work.optimizer:
            self.learn(self.work.groups(drawn))
            with self.phase("step"):
                latro.update(self.work.policy, self.work.optimizer, 0, self.work.args)
        return drawn

    def gradient(self) -> list[Tensor]:
        """That of the first question, of the head, the first block and the last."""
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
        import latro
        w = self.work
        w.attend("latro")
        with latro.gathered(w.policy):
            return [ids for ids, *_ in sample(w.policy, [e.x for e in w.batch], [], [w.eos],
                                              w.args.K, w.args.L, w.uniform)]

    def learn(self, groups: list[list[Rationale]]) -> None:
        import latro
        w = self.work
        w.attend("latro")
        for some in latro.deal([*map(tree_size, w.batch, groups)], w.args.micro):
            x, z = zip(*((w.batch[i], groups[i]) for i in some))
            with self.phase("score"):
                logp, s = latro.score(w.policy, w.reference, x, z, w.args)
            with self.phase("backward"):
                latro.backward(-(s.weights * logp).sum(), w.policy)


class Generate(Loop):
    """transformers' `generate` on K copies of each prompt."""

    def __init__(self, work: Work, **settings):
        super().__init__(work)
        self.config = transformers.GenerationConfig(**dict(
            max_new_tokens=work.args.L, do_sample=True, top_k=0, pad_token_id=0,
            eos_token_id=work.eos) | settings)

    def draw(self, driven: bool) -> list[list[int]]:
        import latro
        w, prompts = self.work, [e.x for e in self.work.batch for _ in range(self.work.args.K)]
        width = max(map(len, prompts))
        ids = torch.tensor([[-1] * (width - len(x)) + x for x in prompts], device=device())
        w.attend("sdpa")
        with latro.gathered(w.policy):
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
        """(K,) log-probs of each row's second part behind its first, nats."""
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
        settings = trl.RLOOConfig(
            output_dir=w.folder.name, num_generations=w.args.K, max_completion_length=w.args.L,
            per_device_train_batch_size=w.args.K, gradient_accumulation_steps=len(w.batch),
            beta=w.args.beta, top_k=0, learning_rate=0.0, max_steps=1, bf16=cuda, use_cpu=not cuda,
            gradient_checkpointing=w.args.checkpointing, shuffle_dataset=False, report_to="none",
            save_strategy="no", logging_strategy="no", disable_tqdm=True)
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


class Floor(Loop):
    """What the hardware takes for the bytes of `Work.bytes` and the products of `Work.flops`: one
    forward pass each of policy and reference, a backward pass that costs two."""

    def run(self, driven: bool) -> list:
        with self.phase("sample"):
            read(self.work.bytes())
        for phase in ("score", "backward") if self.work.optimizer else ():
            with self.phase(phase):
                multiply(2 * self.work.flops())
        return []


@cache
def operand(n: int, place: str) -> Tensor:
    return torch.randn(n, n, device=place,
                       dtype=torch.bfloat16 if place == "cuda" else torch.float32)


def multiply(flops: float) -> None:
    """Matrix products of so many FLOPs, as large as the hardware likes them."""
    n = 8192 if device() == "cuda" else 512
    while 2 * n**3 > flops:
        n //= 2
    for _ in range(round(flops / (2 * n**3))):
        operand(n, device()) @ operand(n, device())


def read(size: float) -> None:
    """Reads so many bytes, from more memory than caches hold."""
    n = 16384 if device() == "cuda" else 4096
    numbers = operand(n, device()).view(torch.float32).flatten()
    whole, rest = divmod(int(size) // 4, len(numbers))
    for part in [numbers] * whole + [numbers[:rest]]:
        part.sum()


def errors(truth: dict, loop: Loop) -> dict[str, float]:
    """By how much a candidate misses: rationales of another length than the forced one, or of other
    tokens than `generate`'s when both draw by the same numbers; its gradient, relative to ours."""
    work, exact = loop.work, "tokens" in truth
    drawn = loop(driven=exact)
    found = dict(lengths=float(sum(len(z) != n for z, n in zip(drawn, work.lengths, strict=True))))
    if exact:
        found["tokens"] = float(sum(a != b for a, b in zip(drawn, truth["tokens"])))
    if hasattr(loop, "learn") and "gradient" in truth:
        pairs = zip(loop.gradient(), truth["gradient"])
        found["gradient"] = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    loop.runs.clear()
    return found


def report(loops: dict[str, Loop], name: str, times: dict[str, dict]) -> dict:
    """Seconds by phase, and what they say; figures for which there is no measurement are absent."""
    median = {of: {p: quartiles([run[p] for run in loops[of].runs])["median"]
                   for p in loops[of].runs[0]} for of in {name, FLOOR}}
    loop, own, floor = loops[name], median[name], median[FLOOR]
    work, [total] = loop.work, [t["median"] for t in times.values()]
    figures = {"rationales/s": len(work.lengths) / total, "tokens/s": sum(work.lengths) / total}
    if work.optimizer:
        learning = own["score"] + own["backward"]
        figures["of decode limit"] = floor["sample"] / own["sample"]
        figures["MFU"] = (floor["score"] + floor["backward"]) / learning
        if device() == "cuda":
            figures["MFU of 989 TFLOP/s"] = 4 * work.flops() / learning / FLOPS
    if name == FLOOR:
        figures = {"GB/s": work.bytes() / own["sample"] / 1e9}
        if work.optimizer:
            figures["TFLOP/s"] = 4 * work.flops() / learning / 1e12
    elif device() == "cuda":
        figures["peak GB"] = loop.peak / 1e9
    return dict(phases=own, figures=figures)


def loop_task(model: str, args: argparse.Namespace, train: bool) -> Task:
    """Tolerance: in bfloat16 advantages are small differences of rounded sums; a wrong sign or a
    missing term does not pass."""
    work, exact = Work(model, args, train), device() == "cpu"
    static, graphs = dict(cache_implementation="static"), transformers.CompileConfig()
    graphs._compile_all_devices = True  # not only on a GPU
    ours, floor, name = Ours(work), Floor(work), "update" if train else "rollout"
    rivals = dict(trl=Trl(work) if find_spec("trl") else "not installed") if train else dict(
        generate=Generate(work), static=Generate(work, **static, disable_compile=True),
        compiled=uncompilable() or Generate(work, **static, compile_config=graphs))
    loops = {OURS: ours} | rivals | dict(released=Released(work))
    truth = dict(tokens=Generate(work).draw(driven=True)) if exact else {}
    truth |= dict(gradient=ours.gradient()) if train else {}
    floor(), floor.runs.clear()  # the first run makes its operands
    shape = dict(model=model, layers=work.shape.layers, questions=args.questions, K=args.K,
                 L=args.L, tokens=sum(work.lengths))
    return Task(shape, loops, 1e-4 if exact else 0.3, partial(errors, truth),
                lambda loop: {name: lambda: loop}, {name: lambda: floor}, calls=1,
                report=partial(report, loops | {FLOOR: floor}))


def decode_task(model: str, args: argparse.Namespace) -> Task:
    """One step of questions x K rows, L tokens behind each, the same step again and again."""
    work, rows = Work(model, args, train=False), args.questions * args.K
    prompts = np.random.default_rng(0).integers(work.eos, size=(rows, args.L)).tolist()
    chance = torch.rand(rows, dtype=torch.float64, device=device())
    decoder = Decoder(work.policy, prompts, 1, 1)
    with torch.no_grad():
        logits = decoder.begin()
    decoder.shape(1)
    token, drawn = logits.argmax(-1), torch.empty_like(chance, dtype=torch.long)

    @torch.no_grad()
    def step() -> tuple:
        logits.copy_(decoder.step(token))
        drawn.copy_(pick_tokens(logits, chance, 1.0))
        decoder.end -= 1
        return ()
    recorded = Recorded(step) if decoder.pace.graphs else None
    steps = {OURS: partial(recorded, ()) if recorded else step,
             "eager": step if recorded else "the same: a CPU records nothing"}

    def result(run: Callable) -> Tensor:
        [run() for _ in range(3)]  # what is recorded runs as such from the second time on
        return logits.clone()
    truth, width = result(step), torch.finfo(work.dtype).bits // 8
    floor = partial(read, width * (work.weights() + rows * args.L * work.token()))
    return Task(dict(model=model, layers=work.shape.layers, rows=rows, columns=args.L), steps, 1e-3,
                lambda run: dict(logits=relative(result(run), truth)),
                lambda run: dict(step=lambda: run), dict(step=lambda: floor))


def tasks(args: argparse.Namespace, train: bool) -> Tasks:
    for model in args.models:
        yield partial(loop_task, model, args, train)


def decode(args: argparse.Namespace) -> Tasks:
    """A step of decoding: a token for each of questions x K rows that have L tokens behind them,
    drawn too. floor: a read of the weights, keys and values that it must read. eager: what is ours,
    launched operation by operation. error: of the logits, relative to eager's."""
    for model in args.models:
        yield partial(decode_task, model, args)


def measured(make: Callable[[], Task], only: list[str] | None, rounds: int) -> tuple[dict, list]:
    """measure, in a group of this process alone, as latro.train makes one."""
    import latro
    latro.connect()
    try:
        return measure(make, only, rounds)
    finally:
        dist.destroy_process_group()


def measured_apart(*args) -> tuple[dict, list]:
    """measured, in a process of its own: models leave nothing behind for the next ones."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(measured, *args).result()


def rollout(args: argparse.Namespace) -> Tasks:
    """K rationales for each question. generate, static, compiled: transformers' own, with a growing
    cache, a static one, and torch.compile; released: as the paper's code calls it, every row
    decoding L tokens. floor: a read of the bytes that decoding must read, the limit of its speed.
    error: rationales of a wrong length, and in float32 of other tokens than generate's."""
    return tasks(args, train=False)


def update(args: argparse.Namespace) -> Tasks:
    """Sampling, rewards, gradient and AdamW for some questions. released: as the paper's code goes
    about it; trl: RLOOTrainer with generate, whose reward is free. floor: a read of what decoding
    must read, then bare products of as many FLOPs as two forward passes (policy and reference) and
    a backward pass need that compute nothing twice. MFU: these FLOPs by the seconds of score and
    backward, of what the bare products reach. peak GB: a candidate's own models included."""
    if args.K < 2:
        raise Problem(f"--K {args.K}: a leave-one-out baseline needs at least 2")
    return tasks(args, train=True)


def word(token: int) -> str:
    return f"<{token}>"  # no word is a part of another: special ones are looked for anywhere


def spelling(V: int) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer whose texts are words for token ids between spaces; the last one is EOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = Tokenizer(models.WordLevel({word(i): i for i in range(V)}, unk_token=word(0)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token=word(V - 1),
                                                pad_token=word(0))
