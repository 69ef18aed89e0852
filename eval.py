"""Grades a checkpoint beside the model it came from, and beside SFT, on the same questions.

    python eval.py --ckpt out/                                    one table, with 95 % intervals
    python eval.py --ckpt out/ --sft sft/ --show 5 --report out/report.html --figures
    torchrun --nproc_per_node 8 eval.py --ckpt out/ --task gsm8k --k 32

Every row answers the same test questions from the same prompts with the same random numbers, which
hang on (--seed, question) alone: neither --batch nor the number of processes changes a sample. Each
question is written to --out as it is done; an interrupted run goes on from there.

greedy, T = 1  accuracy of the greedy reply, and of one of k samples: strict, the answer behind the
               template; loose: or the last number, the last option (kernels/answers.py)
maj@k, pass@k  accuracy of the most frequent answer, ties to the one given first; of any
log p(y|x)     of the gold answer behind the template, nats: without a rationale, with the data's
               own (gold), with that of another question, with a sampled one (z)
template ...   log p behind a sampled rationale of the template, the gold answer, its end, nats
ELBO, bound    E log p(y|x+z) - KL to the base; log mean_k p(y|x+z) pi_0(z|x) / pi(z|x), nats
z, ends        length of the rationale in tokens, share that ended before L
reaches        share of rationales whose last number or option is the gold answer; follows: whose
               last number or option is the reply's own answer
r ~ right      correlation of reward and being right within a question, where both vary
entropy        of the policy's choice of a token of z, nats; unique: share of different rationales

--figures      curves.png, likelihood.png, length.png, votes.png; their numbers: figures.json
"""

import argparse, dataclasses, json, math, re, shlex, shutil, sys, textwrap
from base64 import b64encode
from collections import Counter
from fractions import Fraction
from functools import cache, lru_cache
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import latro  # before transformers: see there
from kernels import (as_number, canonical, facts, flexible, gold_rationale, logged, majority,
                     printable, records, same_answer, summary, write)
from latro import Example, Problem

RESAMPLES = 10_000
PARTS = "template", "answer", "end"  # of what the model is asked to say behind a rationale
TABLES = (("greedy", "loose", "T = 1", "maj@k", "pass@k"),
          ("log p(y|x)", "log p(y|x+gold)", "log p(y|x+other)", "log p(y|x+z)", "ELBO", "bound"),
          ("z", "ends", *PARTS), ("reaches", "follows", "r ~ right", "entropy", "unique"))
GROUPS = {(False, True): "fixed", (True, False): "broken", (True, True): "both right",
          (False, False): "both wrong"}  # by the greedy replies of the first row and of the last
PAGE = latro.HERE / "assets" / "report.html"
SAVED = "task", "data", "L", "seed"  # flags of latro.py whose values are the checkpoint's


# ------------------------------------------------------------------------------ 1. arguments
def count(least: int):
    """The type of a flag: a whole number, at least so large."""
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {least}")
        return int(text)
    return number


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="eval.py", allow_abbrev=False)
    parser.error = latro.refuse
    add = parser.add_argument
    add("--ckpt", nargs="+", required=True, help="directories of runs of latro.py")
    add("--base", help="hub id or directory (default: what --ckpt was trained from)")
    add("--sft", help="a third row: directory of a run with --objective sft")
    add("--task", choices=[*latro.TASKS], help="(default: that of --ckpt)")
    add("--data", help="directory with test.jsonl, or a hub id (default: that of --ckpt)")
    add("--split", default="test", help="(default: test)")
    add("--k", type=count(2), default=8, help="samples a question (default: 8)")
    add("--L", type=count(1), help="longest rationale, tokens (default: that of --ckpt)")
    add("--questions", type=count(0), default=0, help="the first so many; 0: all (default: 0)")
    add("--batch", type=count(1), default=16, help="questions at a time (default: 16)")
    add("--seed", type=count(0), default=0, help="of the samples (default: 0)")
    add("--out", help="directory of the results (default: {--ckpt}/eval)")
    add("--show", type=count(0), default=0, help="questions to print with replies (default: 0)")
    add("--report", help="HTML file to write: every question with all its replies")
    add("--figures", action="store_true", help="draw the results into --out; needs matplotlib")
    return parser.parse_args(argv)


def settings(flags: argparse.Namespace) -> latro.Args:
    """The checkpoint's own settings where no flag says otherwise; y is what follows the template
    for every row, whatever it was trained on."""
    first = Path(flags.ckpt[0])
    for folder in filter(None, [*flags.ckpt, flags.sft]):
        if not Path(folder, "config.json").exists():
            raise Problem(f"{folder}: no model there; name the --out of a run that has saved one")
    saved = latro.recall(first)
    given = {k: v for k, v in vars(flags).items() if k in SAVED and v is not None}
    own = dict(questions=3 * latro.world_size()) | saved["args"] | given | dict(
        model=flags.base or saved["base"], out=flags.out or str(first / "eval"),
        credit="answer", bound="elbo", reward="logp", truncation_penalty=0.0, checkpointing=False)
    needed = dict(task="task", data="data", base="model")
    if missing := [f"--{flag}" for flag, k in needed.items() if not own.get(k)]:
        raise Problem(f"--ckpt {first} has no latro.json that says so: give {', '.join(missing)}")
    return latro.Args(**own)


# ------------------------------------------------------------------------------ 2. replies
def fingerprint(model: str) -> list:
    """Tells one state of a model directory from another."""
    files = sorted(Path(model).glob("*.safetensors"))
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def evidence(policy, codec, examples: list[Example], some: slice, args) -> list[dict]:
    """What the gold answer is worth without a rationale, with the one given in the data and
    with another question's: log-probs of template, answer and end, nats."""
    def worth(i: int, e: Example) -> dict:
        known = dict(direct=[], given=e.z, other=examples[(i + 1) % len(examples)].z)
        known = {name: z for name, z in known.items() if z or name == "direct"}
        group = [gold_rationale(codec, z, e.answer) for z in known.values()]
        [rows] = records(codec, [e], [group], *latro.score(policy, None, [e], [group], args))
        return {name: {part: r[part] for part in PARTS}
                for name, r in zip(known, rows)}

    with torch.no_grad(), latro.gathered(policy):
        return latro.gather([worth(i, e) for i, e in latro.share([*enumerate(examples)][some])])


def replies(name: str, model: str, load, reference, codec, examples: list[Example],
            args: latro.Args, flags: argparse.Namespace) -> list[dict]:
    """A record a question, in {out}/{name}.jsonl too: what is there already is not made again."""
    path = Path(args.out, f"{name}.jsonl")
    head = dict(model=model, weights=fingerprint(model), split=flags.split, k=flags.k, L=args.L,
                seed=args.seed, data=args.data, questions=len(examples))
    held = logged(path) if path.exists() else []
    done = held[1:] if held[:1] == [head] else []
    dist.barrier()  # all have read before the first one writes
    if latro.is_first():
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, "".join(json.dumps(r) + "\n" for r in [head, *done]))
    policy = load() if len(done) < len(examples) else None
    bar = tqdm(total=len(examples), initial=len(done), desc=name, disable=not latro.is_first())
    while len(done) < len(examples):
        some = slice(len(done), len(done) + flags.batch)
        fresh = latro.evaluate(policy, reference(), codec, examples, args, flags.k, some)
        for row, known in zip(fresh, evidence(policy, codec, examples, some, args)):
            done.append(row | known)
            latro.log(args, path.name, done[-1])
        bar.update(len(fresh))
        bar.set_postfix(greedy=f"{np.mean([r['right'] for r in done]):.3f}")
    bar.close()
    return done


# ------------------------------------------------------------------------------ 3. numbers
def options(question: str) -> list[str]:
    """What ARC-Challenge offers, a line each."""
    return [line[2:] for line in question.split("\n") if line.startswith("- ")]


def bound(samples: list[dict]) -> float:
    """log mean_k pi(y|x+z) pi_0(z|x) / pi(z|x), nats."""
    logs = np.array([s["logp_y"] - s["logp_z"] + s["logp0_z"] for s in samples])
    return float(np.logaddexp.reduce(logs) - math.log(len(logs)))


def follows(samples: list[dict], choices: list[str], numeric: bool) -> float | None:
    """Of the samples that answer, the share whose answer is where their rationale led."""
    said = [(s["z"], canonical(s["said"], numeric)) for s in samples]
    led = [flexible(z, str(answer), choices) for z, answer in said if answer != ""]
    return float(np.mean(led)) if led else None


def columns(row: dict) -> dict[str, float | None]:
    """What one question says of a model, by column of TABLES; None: nothing."""
    samples, gold, choices = row["samples"], row["gold"], options(row["question"])
    numeric = as_number(gold) is not None
    voted = majority([s["said"] for s in samples], numeric)
    right, known = [s["right"] for s in samples], summary([samples])
    behind = lambda z: row[z]["answer"] + row[z]["end"] if z in row else None
    return {
        "greedy": row["right"], "loose": flexible(row["text"], gold, choices),
        "T = 1": float(np.mean(right)), "maj@k": same_answer(voted, gold), "pass@k": any(right),
        "log p(y|x)": behind("direct"), "log p(y|x+gold)": behind("given"),
        "log p(y|x+other)": behind("other"), "log p(y|x+z)": known["logp_y"],
        "ELBO": known["elbo"], "bound": bound(samples),
        "z": known["z_len"], "ends": known["finished"], **{part: known[part] for part in PARTS},
        "reaches": known["reaches"], "follows": follows(samples, choices, numeric),
        "r ~ right": known["reward_right"], "entropy": known["entropy"], "unique": known["unique"]}


class Estimate(NamedTuple):
    """A mean over questions and the 95 % interval of the bootstrap over questions, which has no
    width where all questions agree. None: no question, or not every resample, says anything."""

    mean: float | None
    low: float | None
    high: float | None


@lru_cache(maxsize=1)
def resamples(n: int) -> np.ndarray:
    """(RESAMPLES, n): how often each question was drawn, over n. The same at every call."""
    return np.random.default_rng(0).multinomial(n, [1 / n] * n, RESAMPLES) / n


def estimates(values: np.ndarray) -> list[Estimate]:
    """One for each column of (questions, columns); a question whose value is NaN does not count."""
    weights, there = resamples(len(values)), ~np.isnan(values)
    held = np.where(there, values, 0)
    with np.errstate(invalid="ignore"):  # 0 / 0: nothing there
        mean, drawn = held.sum(0) / there.sum(0), (weights @ held) / (weights @ there)
    ends = np.quantile(drawn, [0.025, 0.975], axis=0)
    return [Estimate(*(None if math.isnan(v) else float(v) for v in e)) for e in zip(mean, *ends)]


def mcnemar(before: list[bool], after: list[bool]) -> tuple[int, int, float]:
    """Questions fixed and broken, and the exact two-sided p of such a split if both were as
    likely (McNemar 1947, the binomial form)."""
    fixed = sum(b > a for a, b in zip(before, after))
    broken = sum(a > b for a, b in zip(before, after))
    n, few = fixed + broken, min(fixed, broken)
    tail = sum(math.comb(n, i) for i in range(few + 1))
    return fixed, broken, min(1.0, float(Fraction(2 * tail, 2**n)))


def results(rows: dict[str, list[dict]]) -> dict[str, dict]:
    """By row of the table: its estimates, and what they differ by from the first row's.

    Raises Problem for a log-prob that is no number, which would spoil or shun the means."""
    values = {name: [columns(r) for r in done] for name, done in rows.items()}
    for name, of in values.items():
        for i, row in enumerate(of, 1):
            if broken := [c for c, v in row.items() if v is not None and math.isnan(v)]:
                raise Problem(f"{name}, question {i}: {broken[0]} is not a number; the model's"
                              " weights are broken, leave it out or name an earlier checkpoint")
    numbers = {name: np.array([[*v.values()] for v in of], float) for name, of in values.items()}
    first, *_ = rows
    names = [*values[first][0]]

    def of(name: str) -> dict:
        own = dict(zip(names, estimates(numbers[name])))
        if name == first:
            return dict(columns=own)
        gain = dict(zip(names, estimates(numbers[name] - numbers[first])))
        pair = [[r["right"] for r in rows[n]] for n in (first, name)]
        return dict(columns=own, gain=gain, mcnemar=mcnemar(*pair))
    return {name: of(name) for name in rows}


def digits(name: str, value: float | None) -> str:
    """A number of a column as text."""
    places = 1 if name == "z" else 2 if name in (*TABLES[1], *PARTS) else 3
    return "-" if value is None else f"{value:.{places}f}"


def cells(found: dict[str, dict], k: int) -> list[list[list[tuple[str, str]]]]:
    """The tables' text: by table and line, mean and interval; the first line are the names."""
    def cell(name: str, e: Estimate) -> tuple[str, str]:
        mean, low, high = (digits(name, value) for value in e)
        return mean, "" if low == "-" else f"{low} to {high}"

    return [[[("", ""), *((n.replace("@k", f"@{k}"), "") for n in names)],
             *([(row, ""), *(cell(n, of["columns"][n]) for n in names)]
               for row, of in found.items())] for names in TABLES]


def table(found: dict[str, dict], k: int) -> str:
    """For a terminal: the interval below the mean."""
    def lines(rows: list[list[tuple[str, str]]]) -> Iterator[str]:
        flat = [line for row in rows for line in zip(*row) if any(line)]
        widths = [max(map(len, column)) for column in zip(*flat)]
        yield from ("  ".join(map(str.rjust, line, widths)).rstrip() for line in flat)
    return "\n\n".join("\n".join(lines(rows)) for rows in cells(found, k))


def markdown(found: dict[str, dict], k: int) -> str:
    def line(texts: list[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |\n"

    def lines(rows: list[list[tuple[str, str]]]) -> str:
        heads, *rest = [[f"{mean} ({span})" if span else mean for mean, span in row]
                        for row in rows]
        return "".join(map(line, [heads, ["---"] * len(heads), *rest]))
    return "\n".join(map(lines, cells(found, k)))


def verdict(name: str, base: str, row: dict) -> str:
    """The paired comparison of greedy replies, in a sentence."""
    fixed, broken, p = row["mcnemar"]
    gain = row["gain"]["greedy"]
    return (f"{name} - {base}, greedy, same questions: {gain.mean:+.3f} ({gain.low:+.3f} to"
            f" {gain.high:+.3f}); {fixed} fixed, {broken} broken, McNemar's exact p = {p:.2g}")


# ------------------------------------------------------------------------------ 4. --show
def groups(rows: dict[str, list[dict]]) -> list[str]:
    """What became of each question between the first row and the last: one of GROUPS."""
    first, *_, last = rows.values()
    return [GROUPS[before["right"], after["right"]] for before, after in zip(first, last)]


def telling(found: list[str]) -> list[int]:
    """All questions, those that say most first: fixed and broken in turn, then the others."""
    seen, places = Counter(), []
    for i, group in enumerate(found):
        places.append((group.startswith("both"), seen[group], i))
        seen[group] += 1
    return [i for *_, i in sorted(places)]


def wrapped(text: str, width: int) -> list[str]:
    lines = printable(text).split("\n")
    return [part for line in lines for part in textwrap.wrap(line, max(1, width)) or [""]]


def beside(texts: list[str], width: int) -> str:
    """Texts as columns of one width."""
    room = (width - 3 * (len(texts) - 1)) // len(texts)
    lines = zip_longest(*(wrapped(text, room) for text in texts), fillvalue="")
    return "\n".join(" | ".join(part.ljust(room) for part in line).rstrip() for line in lines)


def shown(rows: dict[str, list[dict]], i: int, group: str, width: int) -> str:
    """Question i, and what base, SFT and the last row reply: greedy, and the first sample."""
    names = [name for name in rows if name in (next(iter(rows)), "sft", [*rows][-1])]
    own = [rows[name][i] for name in names]
    word = lambda reply: "right" if reply["right"] else "wrong"
    greedy = [f"{name}\n\ngreedy: {word(r)}\n{r['text']}" for name, r in zip(names, own)]
    sampled = [f"sampled: {word(s)}, r {s['reward']:.2f} nats\n{s['text']}"
               for s in (r["samples"][0] for r in own)]
    ask = wrapped(f"{own[0]['question']} [{own[0]['gold']}]", width)
    parts = *ask, "", beside(greedy, width), "", beside(sampled, width)
    return "\n".join(["", f"question {i + 1}: {group}", *parts])


# ------------------------------------------------------------------------------ 5. --report
def content(command: str, rows: dict[str, list[dict]], found: dict[str, dict], k: int) -> dict:
    """What the page shows; numbers as text, which also holds what JSON cannot: -inf."""
    def reply(r: dict) -> dict:
        direct = r["direct"]["answer"] + r["direct"]["end"]
        return dict(
            text=r["text"], right=r["right"], direct=f"{direct:.2f}",
            samples=[[s["text"], s["right"], f"{s['reward']:.2f}", f"{s['logp_y']:.2f}", s["z_len"]]
                     for s in r["samples"]])

    first, *others = rows
    questions = [
        dict(question=own[0]["question"], gold=own[0]["gold"], group=group, rows=[*map(reply, own)])
        for group, *own in zip(groups(rows), *rows.values())]
    return dict(command=command, names=[*rows], groups=[*GROUPS.values()], tables=cells(found, k),
                verdicts=[verdict(name, first, found[name]) for name in others],
                questions=questions)


def embed(what: dict) -> str:
    """JSON that no text in it can end: ASCII alone, without <, > and &."""
    text = json.dumps(what, separators=(",", ":"))
    return re.sub("[<>&]", lambda c: f"\\u{ord(c[0]):04x}", text)


def page(what: dict) -> str:
    """One HTML file that fetches nothing. Its policy names its script and style by their hashes:
    a browser runs no other, whatever a reply holds."""
    template = PAGE.read_text()

    def digest(tag: str) -> str:
        inside = re.search(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[1]
        return b64encode(sha256(inside.encode()).digest()).decode()

    parts = dict(data=embed(what), script=digest("script"), style=digest("style"))
    return re.sub(r"{{(\w+)}}", lambda place: parts[place[1]], template)  # once: data may hold {{


def write_page(path: str, text: str) -> None:
    try:
        write(Path(path), text)
    except (OSError, ValueError) as e:  # ValueError: no file has such a name
        raise Problem(f"--report {path}: cannot be written ({latro.brief(e)}); name another file"
                      " and run this again: all replies are kept, none is made anew") from e


# ------------------------------------------------------------------------------ 6. --figures
LOGGED = "elbo", "logp_y", "greedy", "sampled", "z_len", "kl"
GIVEN = "direct", "sampled", "given", "other"  # what stands before y in likelihood.png


def drawing():
    """The module that draws; refuses before anything is evaluated where it cannot."""
    try:
        from assets import figures  # late: only --figures needs matplotlib
    except ModuleNotFoundError as e:
        raise Problem(f"--figures needs the package {e.name}, which is not installed here:"
                      " pip install matplotlib") from e
    return figures


def band(values: list[list[float]]) -> dict[str, list[float]]:
    """mean, low and high of every column of (questions, columns): see Estimate."""
    return dict(zip(Estimate._fields, zip(*estimates(np.array(values, float)))))


def curves(folder: str) -> dict | None:
    """What a run logged, over questions seen: "held_out", the looks at its fixed held-out batch,
    and "updates". None where `folder` has no logs."""
    if not all(Path(folder, f).exists() for f in ("latro.json", "evals.jsonl", "metrics.jsonl")):
        return None
    size = latro.recall(folder)["args"]["questions"]

    def over(name: str, ahead: int) -> dict[str, list]:
        rows = logged(Path(folder, name))
        return dict(seen=[size * (r["step"] - ahead) for r in rows],
                    **{key: [r.get(key) for r in rows] for key in LOGGED})
    # An update logs what the policy was before it: update 1 has seen no questions.
    return dict(held_out=over("evals.jsonl", 0), updates=over("metrics.jsonl", 1))


def likelihood(done: list[dict]) -> dict[str, dict]:
    """Mean -log p(y|x) of template + gold answer + end, nats (the paper's figure 2), by what stands
    before y: nothing, a sampled z (mean over samples), the gold z, another question's gold z.

    "answer" is answer + end. The policy chose to write the template behind a sampled z, and not
    behind the others: compare the answers where the templates differ much."""
    def loss(row: dict, name: str) -> list[float]:
        known = row["samples"] if name == "sampled" else [row[name]]
        parts = np.mean([[k["template"], k["answer"] + k["end"]] for k in known], axis=0)
        return [*-parts, -parts.sum()]

    there = [n for n in GIVEN if n == "sampled" or all(n in row for row in done)]
    means = {n: estimates(np.array([loss(row, n) for row in done])) for n in there}
    return {n: dict(template=t.mean, answer=a.mean, total=total)
            for n, (t, a, total) in means.items()}


def lengths(done: list[dict], L: int) -> dict[str, list[float]]:
    """Greedy accuracy at every limit 1..L (the paper's figure 3a), from one evaluation at L.

    The policy does not know its limit, and a greedy reply draws no random numbers: limits only cut
    it. z runs until its stop (`actions` counts that too) where the stop's last token is within the
    limit, else it is cut and has no answer. So a reply is right at a limit if and only if it is
    right at L and actions <= limit: exact for replies that spell the template as one of
    Codec.stops. Samples have no such curve: a random number's place hangs on the limit."""
    return band([[row["right"] and row["actions"] <= limit for limit in range(1, L + 1)]
                 for row in done])


def ballots(row: dict, order: np.ndarray) -> list[float]:
    """Of subsets of k = 1..K samples, the share whose majority is right (kernels.majority).

    K subsets of each size: runs of k in a random `order` closed to a ring. The first k alone would
    rest on one draw a question, and wander with k by chance; here every sample counts k times, so
    that k = 1 is the accuracy of a sample and k = K the table's maj@k, both to the last digit."""
    codes, right = {"": 0}, [False]  # small numbers for the forms that votes are counted by
    forms = [canonical(s["said"], as_number(row["gold"]) is not None) for s in row["samples"]]
    for s, form in zip(row["samples"], forms):
        if codes.setdefault(form, len(codes)) == len(right):
            right.append(same_answer(s["said"], row["gold"]))
    given = [codes[form] for form in forms]
    K, ring = len(given), [*order.tolist() * 2]

    def wins(start: int, k: int) -> bool:
        some = sorted(ring[start:start + k])  # as they were given: of equals the first one wins
        votes = Counter(given[i] for i in some if given[i])
        return right[max(votes, key=votes.get, default=0)]
    return [float(np.mean([wins(i, k) for i in range(K)])) for k in range(1, K + 1)]


def passes(row: dict) -> list[float]:
    """pass@k for k = 1..K: 1 - C(K - c, k) / C(K, k) for c right samples, the unbiased estimator
    of Chen et al. 2021, arXiv 2107.03374."""
    K, c = len(row["samples"]), sum(s["right"] for s in row["samples"])
    return [1 - math.comb(K - c, k) / math.comb(K, k) for k in range(1, K + 1)]


def votes(done: list[dict]) -> dict[str, dict]:
    """maj@k and pass@k for k = 1..K (the paper's figure 3b), the same subsets for every row."""
    draw, K = np.random.default_rng(0), len(done[0]["samples"])
    return {"maj": band([ballots(row, draw.permutation(K)) for row in done]),
            "pass": band([passes(row) for row in done])}


def derive(rows: dict[str, list[dict]], ckpt: list[str], args: latro.Args) -> dict[str, dict]:
    """All numbers behind the figures, by figure and row of the table."""
    runs = {Path(folder).resolve().name: latro.recall(folder)["args"] for folder in ckpt}
    trained = {name: own["L"] for name, own in runs.items() if own}
    by_row = lambda work: {name: work(done) for name, done in rows.items()}
    return dict(curves=curves(ckpt[0]), likelihood=by_row(likelihood), votes=by_row(votes),
                length=dict(trained=trained, rows=by_row(lambda done: lengths(done, args.L))))


# ------------------------------------------------------------------------------ 7. main
def named(flags: argparse.Namespace, base: str) -> dict[str, str]:
    """The rows of the table, and the model of each."""
    models = [("base", base), *([("sft", flags.sft)] if flags.sft else []),
              *((Path(folder).resolve().name, folder) for folder in flags.ckpt)]
    if len(dict(models)) < len(models):
        raise Problem(f"--ckpt {' '.join(flags.ckpt)}: two rows of one name; rename a directory")
    return dict(models)


def grade(flags: argparse.Namespace, args: latro.Args) -> dict[str, list[dict]]:
    """The records of every row."""
    models, device = named(flags, args.model), latro.connect()
    codec, most = latro.read_codec(args)
    asked = latro.read_rows(args, flags.split)[:flags.questions or None]
    if not asked:
        raise Problem(f"--data {args.data}: no {flags.split} split; see --split")
    examples = latro.encode(codec, most, asked, args)
    dtype = latro.compute_dtype(device)
    load = lambda model: latro.load(dataclasses.replace(args, model=model), device, dtype)
    reference = cache(lambda: load(args.model))
    return {name: replies(name, model, reference if name == "base" else lambda: load(model),
                          reference, codec, examples, args, flags)
            for name, model in models.items()}


def publish(rows: dict[str, list[dict]], flags: argparse.Namespace, args: latro.Args,
            command: str, figures) -> None:
    """The table, {out}/eval.json with every reply, and what the flags ask for."""
    found, out = results(rows), Path(args.out)
    print(f"\n{len(rows['base'])} questions of {args.data}, {flags.split}\n")
    print(table(found, flags.k), end="\n\n")
    print(*(verdict(name, "base", found[name]) for name in [*rows][1:]), sep="\n")
    held = facts(latro.world_size()) | dict(command=command, models=named(flags, args.model),
                                settings=dataclasses.asdict(args), results=found, rows=rows)
    write(out / "eval.json", json.dumps(held))
    write(out / "eval.md", markdown(found, flags.k))
    if figures:
        numbers = derive(rows, flags.ckpt, args)
        write(out / "figures.json", json.dumps(numbers))
        figures.draw(numbers, out)
    after, width = groups(rows), shutil.get_terminal_size().columns
    for i in telling(after)[:flags.show]:
        print(shown(rows, i, after[i], width))
    if flags.report:
        write_page(flags.report, page(content(command, rows, found, flags.k)))


def evaluation(argv: list[str]) -> None:
    flags = parse(argv)
    figures, args = drawing() if flags.figures else None, settings(flags)
    rows = grade(flags, args)
    if latro.is_first():
        publish(rows, flags, args, shlex.join(["eval.py", *argv]), figures)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    return latro.guarded("eval.py", lambda: evaluation(argv), "--batch, --k or --L",
                         "--out keeps what is graded: set that right and run this again")


if __name__ == "__main__":
    sys.exit(main())
