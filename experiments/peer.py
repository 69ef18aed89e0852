"""Other trainers do the toy's job: TRL's RLOOTrainer, and the procedure of the released code.

    pip install "trl==1.16.*"
    python experiments/peer.py      on a machine with two idle cores; -h has the flags

Each trains the toy as latro.py does by default: the same base, questions in the same order, K, L,
beta, AdamW, learning rate and number of updates. latro.evaluate grades the weights of every fifth
update on the same held-out questions. The clock runs from the first sample of an update to the end
of its optimizer step, never during evaluation. Each run is a process of its own, alone on the
machine. Finished runs are kept in {--runs}; one that was stopped begins anew.

TRL gets its fastest setting. A probe times a few updates of every entry of SETTINGS, and the runs
take the fastest. The reward is log p(y|x+z) under the policy, from one forward pass without padding
on the left and without a mask. Everything else is in `trl_trainer`. TRL's policy learns from this
reward alone: its gradient is that of latro.py --answer-weight 0, as the test shows.

The released procedure is that of benchmarks/rivals.py, with the gradient of latro.py: see there.
Its rationales end where latro.py's do, but every row decodes L tokens first.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import latro  # noqa: E402  before transformers: see kernels/__init__.py
import transformers  # noqa: E402
from matplotlib import rc_context  # noqa: E402

from benchmarks.rivals import Released  # noqa: E402
from benchmarks.work import PHASES, Workload  # noqa: E402
from experiments.evidence import run_dir  # noqa: E402
from harness.checkpoint import append_jsonl, atomic_write, read_jsonl  # noqa: E402
from harness.data import Example, load_datasets  # noqa: E402
from harness.distributed import init_distributed  # noqa: E402
from harness.errors import run_cli  # noqa: E402
from harness.figures import STYLE, looks, name_rows, new  # noqa: E402
from harness.metrics import environment  # noqa: E402
from latro import Args, Rationale, split_rollout  # noqa: E402

OURS, TRL, RELEASED = "LaTRO", "TRL RLOOTrainer", "released procedure"
# threads: of the process. rows: of a forward pass, of questions x K in all. cache: of `generate`.
SETTINGS = {
    OURS: [dict(threads=n) for n in (1, 2)],
    TRL: [dict(threads=n, rows=rows, cache=cache)
          for n, rows, cache in product((1, 2), (16, 32, 128), ("dynamic", "static"))],
    RELEASED: [dict(threads=n) for n in (1, 2)]}
PROBE = "--steps 6 --eval-every 0 --eval-questions 1".split()
REACHED = 0.95  # of a run's final accuracy


# ------------------------------------------------------------------------------ both peers
class Record:
    """Seconds of each update by phase, and the weights after those that will be evaluated."""

    def __init__(self, args: Args):
        self.args, self.seconds, self.weights = args, [], {}

    def add(self, seconds: dict[str, float], policy) -> None:
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
def answer_logprobs(policy, rows: list[tuple[list[int], list[int]]]) -> torch.Tensor:
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


def clock(record: Record) -> transformers.TrainerCallback:
    """Times updates: training_step, clipping and AdamW."""
    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__) -> None:
            self.start = perf_counter()

        def on_step_end(self, *_, model, **__) -> None:
            record.add(dict(update=perf_counter() - self.start), model)
    return Clock()


def trl_trainer(args: Args, codec, batches: list[list[Example]], setting: dict, record: Record):
    """RLOOTrainer with the settings of a run of latro.py.

    One sampling call makes all rationales of an update, and stops at the template, whose last token
    counts as one more EOS. Advantages are not normalised, the KL is part of the reward, and
    nothing is divided by lengths; these are TRL's defaults. Without dropout, recomputation, mixed
    precision, logs, checkpoints or worker processes."""
    trl, datasets = import_module("trl"), import_module("datasets")
    examples, N = [example for batch in batches for example in batch], args.questions * args.K
    policy = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
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
                              processing_class=codec.tokenizer, callbacks=[clock(record)],
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


# ------------------------------------------------------------------------------ runs
def train(name: str, setting: dict, flags: list[str]) -> None:
    """Trains and evaluates. `flags` are those of latro.py; metrics.jsonl and evals.jsonl of --out
    are as latro.py writes them, but a peer's metrics.jsonl has seconds only."""
    if name == OURS:
        if latro.main(flags):
            raise SystemExit("a run failed: see the message above; finished runs are kept")
        return
    args = latro.parse(flags)
    device = init_distributed()
    codec, train_set, held_out = load_datasets(args)
    batches = [latro.draw_batch(train_set, step, args) for step in range(args.steps)]
    record, train_peer = Record(args), dict(zip((TRL, RELEASED), (train_trl, train_released)))[name]
    Path(args.out).mkdir(parents=True)
    train_peer(args, codec, batches, setting, record)
    for step, seconds in enumerate(record.seconds, 1):
        append_jsonl(Path(args.out, "metrics.jsonl"), dict(step=step, seconds=seconds))
    policy, reference = latro.load_policies(args, device)
    for step, weights in {0: policy.state_dict(), **record.weights}.items():
        policy.load_state_dict(weights)
        latro.evaluate_and_log(step, policy, reference, codec, held_out, args)


def in_new_process(threads: int, function: Callable, *args) -> None:
    with (patch.dict(os.environ, OMP_NUM_THREADS=str(threads)),
          ProcessPoolExecutor(1, get_context("spawn")) as process):
        process.submit(function, *args).result()


def run(name: str, setting: dict, out: Path, flags: list[str]) -> Path:
    """Trains and evaluates in a new process, unless that has been done. Returns its directory."""
    note = out / "setting.json"
    if not note.exists():
        print(f"{name}, {setting}: {out}", flush=True)
        shutil.rmtree(out, ignore_errors=True)  # its time must be that of a single process
        in_new_process(setting["threads"], train, name, setting, [*flags, "--out", str(out)])
        atomic_write(note, json.dumps(setting))
    return out


def seconds_of_updates(out: Path) -> list[float]:
    return [sum(row["seconds"].values()) for row in read_jsonl(out / "metrics.jsonl")]


def probe(name: str, runs: Path, flags: list[str]) -> list[dict]:
    """The settings of a trainer with their seconds per update, fastest first."""
    timed = []
    for i, setting in enumerate(SETTINGS[name]):
        out = run(name, setting, run_dir(runs / "probe", name, i), [*flags, *PROBE])
        timed.append(setting | dict(update=median(seconds_of_updates(out)[1:])))
    return sorted(timed, key=lambda one: one["update"])


# ------------------------------------------------------------------------------ results
def curve(out: Path) -> dict[str, list]:
    """The evaluations of a run over its seconds of training."""
    rows, seconds = read_jsonl(out / "evals.jsonl"), [0.0, *np.cumsum(seconds_of_updates(out))]
    return dict(seconds=[float(seconds[row["step"]]) for row in rows],
                **{key: [row[key] for row in rows] for key in ("step", "greedy", "sampled",
                                                               "logp_y")})


def seconds_to_reach(seconds: list[float], values: list[float], fraction: float) -> float:
    """When the values first reach this fraction of the last one, linear between evaluations."""
    target = fraction * values[-1]
    i = next(i for i, value in enumerate(values) if value >= target)
    if i == 0:
        return seconds[0]
    return float(np.interp(target, values[i - 1:i + 1], seconds[i - 1:i + 1]))


def measures(of: dict[str, list]) -> dict[str, float]:
    """What the table shows of a run."""
    last = {key: of[key][-1] for key in ("greedy", "sampled", "logp_y", "seconds")}
    return last | {f"to_{key}": seconds_to_reach(of["seconds"], of[key], REACHED)
                   for key in ("greedy", "sampled")}


def table(curves: dict[str, list[dict]]) -> str:
    """Markdown: ranges over seeds. A ratio compares runs of the same seed."""
    def span(values: list[float], places: int) -> str:
        return " to ".join(dict.fromkeys(f"{v:.{places}f}" for v in (min(values), max(values))))

    heads = ["", "seeds", "greedy", "T = 1", "log p(y\\|x+z)"]
    for time in ("s in total", "s to 95 % of greedy", "s to 95 % of T = 1"):
        heads += [time, f"x {OURS}"]
    lines, ours = [heads, ["---"] * len(heads)], [*map(measures, curves[OURS])]
    for name, runs in curves.items():
        own = [*map(measures, runs)]
        lines.append([name, str(len(own)), *(span([one[key] for one in own], places) for key, places
                                             in dict(greedy=3, sampled=3, logp_y=2).items())])
        for key in ("seconds", "to_greedy", "to_sampled"):
            ratios = [one[key] / base[key] for one, base in zip(own, ours)]
            lines[-1] += [span([one[key] for one in own], 1), span(ratios, 2)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(curves: dict[str, list[dict]], png: Path) -> None:
    """Greedy and T = 1 accuracy over seconds: a colour for each trainer, a line for each seed."""
    with rc_context(STYLE):
        figure, axes = new(3.4, 1, 2)
        for axis, key in zip(axes, ("greedy", "sampled")):
            for i, (name, runs) in enumerate(curves.items()):
                for n, of in enumerate(runs):
                    label = name if axis is axes[0] and n == 0 else None
                    axis.plot(of["seconds"], of[key], lw=1, label=label,
                              **looks(i) | dict(markersize=3))
            axis.set(xlabel="seconds of training", ylim=(0, 1.02),
                     ylabel=dict(greedy="greedy accuracy", sampled="accuracy at T = 1")[key])
        name_rows(figure).savefig(png, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs of each trainer (default: 3)")
    parser.add_argument("--runs", type=Path, default=Path("runs/peer"),
                        help="directory of the runs (default: runs/peer)")
    parser.add_argument("--out", type=Path, default=ROOT / "experiments",
                        help="directory of peer.json and peer.md (default: experiments)")
    parser.add_argument("--pictures", type=Path, default=ROOT / "assets",
                        help="directory of peer.png (default: assets)")
    parser.add_argument("flags", nargs="*", help="after --: flags of latro.py for every run")
    args = parser.parse_args()
    if not find_spec("trl"):
        raise SystemExit('TRL is not installed here: pip install "trl==1.16.*"')
    flags = ["--eval-every", "5", *args.flags]
    probes = {name: probe(name, args.runs, flags) for name in SETTINGS}
    curves = {name: [] for name in SETTINGS}
    for seed, name in product(range(args.seeds), SETTINGS):
        setting = {k: v for k, v in probes[name][0].items() if k != "update"}
        out = run(name, setting, run_dir(args.runs, name, seed), [*flags, "--seed", str(seed)])
        curves[name].append(curve(out))
    record = dict(environment=environment(1) | dict(trl=import_module("trl").__version__),
                  flags=flags, probes=probes, curves=curves,
                  measures={name: [*map(measures, of)] for name, of in curves.items()})
    atomic_write(args.out / "peer.json", json.dumps(record, indent=1))
    atomic_write(args.out / "peer.md", table(curves))
    draw(curves, args.pictures / "peer.png")
    print(table(curves))


if __name__ == "__main__":
    sys.exit(run_cli("peer.py", main, "--K, --L or --questions", "finished runs are kept"))
