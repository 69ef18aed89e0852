"""Grades a checkpoint, the model it came from, and SFT on the same questions.

    python eval.py --ckpt out/                                    one table, with 95 % intervals
    python eval.py --ckpt out/ --sft sft/ --show 5 --report out/report.html --figures
    torchrun --nproc_per_node 8 eval.py --ckpt out/ --task gsm8k --k 32

Every row of the table answers the same test questions from the same prompts with the same random
numbers. Those depend on (--seed, question) only, so neither --batch nor the number of processes
changes a sample. Each question is written to --out when it is done; an interrupted evaluation
continues from there.

greedy, T = 1  accuracy of the greedy reply, and of one of k samples at --temperature 1: strict, the
               answer after the template; loose: or the last number, or the last option
               (harness/answers.py)
maj@k, pass@k  accuracy of the most frequent answer, the first of a tie; of any of them
log p(y|x)     of the gold answer after the template, nats: without a rationale, with the data's
               own (gold), with that of another question, with a sampled one (z)
log mean ...   log mean_k p(y|x+z), nats; per token: log p(y|x+z) of a token of y, whose perplexity
               is exp(-per token)
template ...   log p after a sampled rationale of the template, the gold answer, its end, nats
ELBO, bound    E log p(y|x+z) - KL to the base; log mean_k p(y|x+z) pi_0(z|x) / pi(z|x), nats
z, ends        length of the rationale in tokens; share that ended before L
reaches        share of rationales whose last number or option is the gold answer; follows: whose
               last number or option is the reply's own answer
r ~ right      correlation of the reward with being right within a question, where both vary
entropy        of the policy's choice of a token of z, nats; unique: share of different rationales

--figures      curves.png, likelihood.png, length.png, votes.png; their numbers: figures.json
"""

import argparse
import dataclasses
import json
import math
import shlex
import shutil
import sys
from datetime import date
from functools import cache
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import latro  # before transformers: see there
from harness.answers import RULES, canonical, flexible, majority, same_answer
from harness.checkpoint import append_jsonl, atomic_write, read_jsonl
from harness.codec import Example
from harness.config import load_run_config
from harness.data import TASKS, encode, load_codec_and_train_rows, read_rows
from harness.distributed import (all_gather_list, compute_dtype, exit_process, init_distributed,
                                 is_main_process, local_slice, processes, unsharded)
from harness.errors import UserError, run_cli, usage_error
from harness.metrics import environment, records, summary
from harness.model import load_config
from harness.report import (PARTS, content, markdown, most_informative_first, outcomes, page, show,
                            table, verdict, write_page)
from harness.statistics import band, estimates, gains, majority_curve, mcnemar, pass_at_k
from transformers import AutoConfig

SAVED = "task", "data", "L", "seed"  # flags of latro.py whose defaults are the checkpoint's values
LOGGED = "elbo", "logp_y", "greedy", "sampled", "z_len", "kl"  # in curves.png
CONTEXTS = "direct", "sampled", "given", "other"  # what precedes y in likelihood.png


# ------------------------------------------------------------------------------ 1. arguments
def at_least(least: float):
    """The type of a flag: a finite number, whole if `least` is, not below it."""
    def number(text: str) -> float:
        value = type(least)(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {least}")
        return value
    return number


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="eval.py", allow_abbrev=False)
    parser.error = usage_error
    add = parser.add_argument
    add("--ckpt", nargs="+", required=True, help="directories of runs of latro.py")
    add("--base", help="hub id or directory (default: what --ckpt was trained from)")
    add("--sft", help="a third row: directory of a run with --objective sft")
    add("--task", choices=[*TASKS], help="(default: that of --ckpt)")
    add("--data", help="directory with test.jsonl, or a hub id (default: that of --ckpt)")
    add("--split", default="test", help="(default: test)")
    add("--k", type=at_least(2), default=8, help="samples per question (default: 8)")
    add("--L", type=at_least(1), help="longest rationale, tokens (default: that of --ckpt)")
    add("--temperature", type=at_least(1e-3), default=1.0, help="of the samples (default: 1.0)")
    add("--questions", type=at_least(0), default=0, help="the first N; 0: all (default: 0)")
    add("--batch", type=at_least(1), help="questions at a time (default: what a rollout holds)")
    add("--seed", type=at_least(0), default=0, help="of the samples (default: 0)")
    add("--out", help="directory of the results (default: {--ckpt}/eval)")
    add("--show", type=at_least(0), default=0, help="questions to print with replies (default: 0)")
    add("--report", help="HTML file to write: every question with all its replies")
    add("--figures", action="store_true", help="draw the results into --out; needs matplotlib")
    return parser.parse_args(argv)


def settings(flags: argparse.Namespace) -> latro.Args:
    """The checkpoint's settings where no flag says otherwise. y is what follows the template for
    every row, whatever it was trained on."""
    first = Path(flags.ckpt[0])
    for folder in filter(None, [*flags.ckpt, flags.sft]):
        if not Path(folder, "config.json").exists():
            raise UserError(f"{folder}: no model there; name the --out of a run that has saved one")
    saved = load_run_config(latro.Args, first)
    given = {k: v for k, v in vars(flags).items() if k in SAVED and v is not None}
    own = dict(questions=3 * processes()) | saved["args"] | given | dict(
        model=flags.base or saved["base"], out=flags.out or str(first / "eval"),
        temperature=flags.temperature, credit="answer", bound="elbo", reward="logp",
        truncation_penalty=0.0, checkpointing=False, lora_rank=0)
    own["date"] = own.get("date") or date.today().isoformat()
    if own.get("task") != saved["args"].get("task"):
        own["prompt"] = None  # the other task's own
    needed = dict(task="task", data="data", base="model")
    if missing := [f"--{flag}" for flag, k in needed.items() if not own.get(k)]:
        raise UserError(f"--ckpt {first} has no latro.json that says so: give {', '.join(missing)}")
    return latro.Args(**own)


# ------------------------------------------------------------------------------ 2. replies
def fingerprint(model: str) -> list:
    """Tells one state of a model from another: its files, or its revision on the hub."""
    if not Path(model).is_dir():
        return [AutoConfig.from_pretrained(model)._commit_hash]
    files = sorted(f for f in Path(model).iterdir() if f.suffix in (".safetensors", ".json"))
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def cache_key(model: str, codec, examples: list[Example], args: latro.Args,
              flags: argparse.Namespace) -> dict:
    """All that a row's records depend on. `asked` is a digest of prompts, answers and stops."""
    asked = repr([examples, codec.eos, codec.template_at_start, codec.template_after_z])
    return dict(model=model, weights=fingerprint(model), base=args.model,
                base_weights=fingerprint(args.model), data=args.data, split=flags.split, k=flags.k,
                L=args.L, seed=args.seed, temperature=args.temperature, rules=RULES,
                questions=len(examples), asked=sha256(asked.encode()).hexdigest())


@torch.no_grad()
def answer_logprobs(policy, codec, examples: list[Example], which: slice, args) -> list[dict]:
    """The log-probs, in nats, of template, gold answer and end: without a rationale ("direct"),
    after the one in the data ("given"), and after another question's ("other")."""
    def logprobs_of(i: int, e: Example) -> dict:
        rationales = dict(direct=[], given=e.z, other=examples[(i + 1) % len(examples)].z)
        rationales = {name: z for name, z in rationales.items() if z or name == "direct"}
        group = [latro.gold_rationale(codec, z, e.answer) for z in rationales.values()]
        logp, scores = latro.score(policy, None, [e], [group], args, given=True)
        [rows] = records(codec, [e], [group], logp, scores)
        return {name: {part: r[part] for part in PARTS} for name, r in zip(rationales, rows)}

    with unsharded(policy):
        mine = local_slice([*enumerate(examples)][which])
        return all_gather_list([logprobs_of(i, e) for i, e in mine])


def replies(name: str, model: str, load, reference, codec, examples: list[Example],
            args: latro.Args, flags: argparse.Namespace) -> list[dict]:
    """A record for each question, also in {out}/{name}.jsonl. What is there already is kept."""
    path = Path(args.out, f"{name}.jsonl")
    head = cache_key(model, codec, examples, args, flags)
    known = read_jsonl(path) if path.exists() else []
    done = known[1:] if known[:1] == [head] else []
    dist.barrier()  # all have read before the first one writes
    if is_main_process():
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, "".join(json.dumps(r) + "\n" for r in [head, *done]))
    policy = load() if len(done) < len(examples) else None
    batch = flags.batch or processes() * latro.evaluation_batch(args, flags.k)
    bar = tqdm(total=len(examples), initial=len(done), desc=name, disable=not is_main_process())
    while len(done) < len(examples):
        which = slice(len(done), len(done) + batch)
        fresh = latro.evaluate(policy, reference(), codec, examples, args, flags.k, which)
        for row, known in zip(fresh, answer_logprobs(policy, codec, examples, which, args)):
            done.append(row | known)
            append_jsonl(path, done[-1])
        bar.update(len(fresh))
        bar.set_postfix(greedy=f"{np.mean([r['right'] for r in done]):.3f}")
    bar.close()
    return done


# ------------------------------------------------------------------------------ 3. the table
def log_mean_exp(logs: list[float]) -> float:
    """The logarithm of a mean of probabilities, from their logarithms, nats."""
    with np.errstate(invalid="ignore"):  # inf - inf: `results` refuses it
        return float(np.logaddexp.reduce(logs) - math.log(len(logs)))


def multi_sample_bound(samples: list[dict]) -> float:
    """log mean_k pi(y|x+z) pi_0(z|x) / pi(z|x), nats."""
    return log_mean_exp([s["logp_y"] - s["logp_z"] + s["logp0_z"] for s in samples])


def follows(samples: list[dict], choices: list[str], gold: str) -> float | None:
    """Of the samples that answer, the share whose answer is the one their rationale ends with."""
    answered = [(s["z"], canonical(s["said"], gold)) for s in samples]
    agree = [flexible(z, str(answer), choices) for z, answer in answered if answer != ""]
    return float(np.mean(agree)) if agree else None


def columns(row: dict) -> dict[str, float | None]:
    """What one question says of a model, by column of report.TABLES. None: nothing."""
    samples, gold, choices = row["samples"], row["gold"], row["options"]
    voted = majority([s["said"] for s in samples], gold)
    right, known = [s["right"] for s in samples], summary([samples])

    def answer_after(context: str) -> float | None:
        return row[context]["answer"] + row[context]["end"] if context in row else None
    return {
        "greedy": row["right"], "loose": flexible(row["text"], gold, choices),
        "sampled": float(np.mean(right)), "maj@k": same_answer(voted, gold), "pass@k": any(right),
        "log p(y|x)": answer_after("direct"), "log p(y|x+gold)": answer_after("given"),
        "log p(y|x+other)": answer_after("other"), "log p(y|x+z)": known["logp_y"],
        "log mean p(y|x+z)": log_mean_exp([s["logp_y"] for s in samples]),
        "per token": sum(s["logp_y"] for s in samples) / sum(s["answers"] for s in samples),
        "ELBO": known["elbo"], "bound": multi_sample_bound(samples),
        "z": known["z_len"], "ends": known["finished"], **{part: known[part] for part in PARTS},
        "reaches": known["reaches"], "follows": follows(samples, choices, gold),
        "r ~ right": known["reward_right"], "entropy": known["entropy"], "unique": known["unique"]}


def compare(values: dict[str, list[dict]]) -> dict[str, dict]:
    """By row of the table: its estimates, and the differences from the first row. `values`: of each
    question, its `columns`.

    Raises UserError for a log-prob that is not a number, which would spoil the means or be left out
    of them."""
    for name, of in values.items():
        for i, row in enumerate(of, 1):
            if broken := [c for c, v in row.items() if v is not None and math.isnan(v)]:
                raise UserError(f"{name}, question {i}: {broken[0]} is not a number; the model's"
                                " weights are broken, leave it out or name an earlier checkpoint")
    numbers = {name: np.array([[*v.values()] for v in of], float) for name, of in values.items()}
    first, *_ = values
    names = [*values[first][0]]

    def result(name: str) -> dict:
        own = dict(zip(names, estimates(numbers[name])))
        if name == first:
            return dict(columns=own)
        gain = dict(zip(names, gains(numbers[name], numbers[first])))
        before, after = ([v["greedy"] for v in values[n]] for n in (first, name))
        return dict(columns=own, gain=gain, mcnemar=mcnemar(before, after))
    return {name: result(name) for name in values}


def results(rows: dict[str, list[dict]]) -> dict[str, dict]:
    """`compare` for the records of every row."""
    return compare({name: [columns(r) for r in done] for name, done in rows.items()})


# ------------------------------------------------------------------------------ 4. figures
def load_figures():
    """The module that draws. Raises UserError, before anything is evaluated, without matplotlib."""
    try:
        from harness import figures  # late: only --figures needs matplotlib
    except ModuleNotFoundError as e:
        raise UserError(f"--figures needs the package {e.name}, which is not installed here:"
                        " pip install matplotlib") from e
    return figures


def curves(folder: str) -> dict | None:
    """What a run logged, over questions seen: its evaluations ("held_out") and its updates. None
    where `folder` has no logs."""
    if not all(Path(folder, f).exists() for f in ("latro.json", "evals.jsonl", "metrics.jsonl")):
        return None
    size = load_run_config(latro.Args, folder)["args"]["questions"]

    def over(name: str, ahead: int) -> dict[str, list]:
        rows = read_jsonl(Path(folder, name))
        return dict(seen=[size * (r["step"] - ahead) for r in rows],
                    **{key: [r.get(key) for r in rows] for key in LOGGED})
    # An update logs the policy as it was before: update 1 has seen no questions.
    return dict(held_out=over("evals.jsonl", 0), updates=over("metrics.jsonl", 1))


def likelihood(done: list[dict]) -> dict[str, dict]:
    """Mean -log p(y|x) of template + gold answer + end, nats (the paper's figure 2), by what
    precedes y: nothing, a sampled z (mean over samples), the gold z, another question's gold z.

    "answer" is answer + end. The policy chose to write the template after a sampled z, and not
    after the others: compare the answers where the templates differ much."""
    def loss(row: dict, name: str) -> list[float]:
        known = row["samples"] if name == "sampled" else [row[name]]
        parts = np.mean([[k["template"], k["answer"] + k["end"]] for k in known], axis=0)
        return [*-parts, -parts.sum()]

    present = [n for n in CONTEXTS if n == "sampled" or all(n in row for row in done)]
    means = {n: estimates(np.array([loss(row, n) for row in done])) for n in present}
    return {n: dict(template=t.mean, answer=a.mean, total=total)
            for n, (t, a, total) in means.items()}


def lengths(done: list[dict], L: int) -> dict[str, list[float]]:
    """Greedy accuracy at every limit 1..L (the paper's figure 3a), from one evaluation at L.

    The policy does not know its limit, and a greedy reply uses no random numbers: a limit only cuts
    it. So a reply is right at a limit if and only if it is right at L and its z, with the template
    that ends it, is within the limit. Samples have no such curve: the place of a random number
    depends on the limit."""
    return band([[row["right"] and row["actions"] <= limit for limit in range(1, L + 1)]
                 for row in done])


def majorities(row: dict, order: list[int]) -> list[float]:
    """majority_curve of one question's samples."""
    said = [s["said"] for s in row["samples"]]
    forms = [canonical(answer, row["gold"]) for answer in said]
    return majority_curve(forms, [same_answer(answer, row["gold"]) for answer in said], order)


def votes(done: list[dict]) -> dict[str, dict]:
    """maj@k and pass@k for k = 1..K (the paper's figure 3b), the same subsets for every row."""
    rng, K = np.random.default_rng(0), len(done[0]["samples"])
    return {"maj": band([majorities(row, rng.permutation(K).tolist()) for row in done]),
            "pass": band([pass_at_k([s["right"] for s in row["samples"]]) for row in done])}


def figure_numbers(rows: dict[str, list[dict]], ckpt: list[str], args: latro.Args) -> dict:
    """All numbers in the figures, by figure and row of the table."""
    runs = {Path(f).resolve().name: load_run_config(latro.Args, f)["args"] for f in ckpt}
    trained = {name: own["L"] for name, own in runs.items() if own}

    def by_row(work) -> dict:
        return {name: work(done) for name, done in rows.items()}
    return dict(curves=curves(ckpt[0]), likelihood=by_row(likelihood), votes=by_row(votes),
                length=dict(trained=trained, rows=by_row(lambda done: lengths(done, args.L))))


# ------------------------------------------------------------------------------ 5. main
def models_by_row(flags: argparse.Namespace, base: str) -> dict[str, str]:
    """The rows of the table, and the model of each."""
    models = [("base", base), *([("sft", flags.sft)] if flags.sft else []),
              *((Path(folder).resolve().name, folder) for folder in flags.ckpt)]
    if len(dict(models)) < len(models):
        raise UserError(f"--ckpt {' '.join(flags.ckpt)}: two rows of one name; rename a directory")
    return dict(models)


def grade(flags: argparse.Namespace, args: latro.Args) -> dict[str, list[dict]]:
    """The records of every row."""
    models, device = models_by_row(flags, args.model), init_distributed(args.timeout)
    for model in models.values():  # all are checked before the first is graded
        load_config(dataclasses.replace(args, model=model))
    # The prompts of training: another --base may have another chat template.
    trained = dataclasses.replace(args, model=flags.ckpt[0])
    codec, train_rows = load_codec_and_train_rows(trained)
    questions = train_rows if flags.split == "train" else read_rows(args, flags.split)
    questions = questions[:flags.questions or None]
    if not questions:
        raise UserError(f"--data {args.data}: no {flags.split} split; see --split")
    examples = encode(codec, questions, args)

    def load(model: str):
        return latro.load(dataclasses.replace(args, model=model), device, compute_dtype(device))
    reference = cache(lambda: load(args.model))
    return {name: replies(name, model, reference if name == "base" else lambda: load(model),
                          reference, codec, examples, args, flags)
            for name, model in models.items()}


def publish(rows: dict[str, list[dict]], flags: argparse.Namespace, args: latro.Args,
            command: str, figures) -> None:
    """Prints the table; writes eval.json with every reply, eval.md, and what the flags ask for."""
    found, out = results(rows), Path(args.out)
    print(f"\n{len(rows['base'])} questions of {args.data}, {flags.split}\n")
    print(table(found, flags.k, flags.temperature), end="\n\n")
    print(*(verdict(name, "base", found[name]) for name in [*rows][1:]), sep="\n")
    record = environment(processes()) | dict(
        command=command, models=models_by_row(flags, args.model),
        settings=dataclasses.asdict(args), results=found, rows=rows)
    atomic_write(out / "eval.json", json.dumps(record))
    atomic_write(out / "eval.md", markdown(found, flags.k, flags.temperature))
    if figures:
        numbers = figure_numbers(rows, flags.ckpt, args)
        atomic_write(out / "figures.json", json.dumps(numbers))
        figures.draw(numbers, out)
    outcome, width = outcomes(rows), shutil.get_terminal_size().columns
    for i in most_informative_first(outcome)[:flags.show]:
        print(show(rows, i, outcome[i], width))
    if flags.report:
        write_page(flags.report, page(content(command, rows, found, flags.k, flags.temperature)))


def run(argv: list[str]) -> None:
    flags = parse(argv)
    figures, args = load_figures() if flags.figures else None, settings(flags)
    rows = grade(flags, args)
    if is_main_process():
        publish(rows, flags, args, shlex.join(["eval.py", *argv]), figures)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 1 after one sentence on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    return run_cli("eval.py", lambda: run(argv), "--batch, --k or --L",
                   "--out keeps what is graded: set that right and run this again")


if __name__ == "__main__":
    exit_process(main())
