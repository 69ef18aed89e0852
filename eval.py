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
log p(y|x)     of the answer behind the template without a rationale, and with a sampled one, nats
ELBO, bound    E log p(y|x+z) - KL to the base; log mean_k p(y|x+z) pi_0(z|x) / pi(z|x), nats
z, ends        length of the rationale in tokens, share that ended before L
"""

import argparse, dataclasses, json, math, re, shlex, shutil, sys, textwrap
from base64 import b64encode
from collections import Counter
from fractions import Fraction
from functools import cache
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import latro  # before transformers: see there
from kernels import flexible, gold_rationale, majority, same_answer
from latro import Example, Problem

RESAMPLES = 10_000
SHARES = "greedy", "loose", "T = 1", "maj@k", "pass@k", "ends"
GROUPS = {(False, True): "fixed", (True, False): "broken", (True, True): "both right",
          (False, False): "both wrong"}  # by the greedy replies of the first row and of the last
PAGE = latro.HERE / "assets" / "report.html"
SAVED = "task", "data", "L", "seed"  # flags of latro.py whose values are the checkpoint's


# ------------------------------------------------------------------------------ 1. arguments
def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="eval.py", allow_abbrev=False)
    parser.error = latro.refuse
    count = lambda least: lambda text: int(text) if int(text) >= least else latro.refuse(
        f"{text}: must be at least {least}")
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
    return parser.parse_args(argv)


def settings(flags: argparse.Namespace) -> latro.Args:
    """The checkpoint's own settings where no flag says otherwise; y is what follows the template
    for every row, whatever it was trained on."""
    first = Path(flags.ckpt[0])
    for folder in filter(None, [*flags.ckpt, flags.sft]):
        if not Path(folder, "config.json").exists():
            raise Problem(f"{folder}: no model there; name the --out of a run that has saved one")
    note = first / "latro.json"
    saved = json.loads(note.read_text()) if note.exists() else dict(args={}, base=None)
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
        [rows] = latro.records(codec, [e], [group], *latro.score(policy, None, [e], [group], args))
        return {name: {k: r[k] for k in ("template", "answer", "end")}
                for name, r in zip(known, rows)}

    with torch.no_grad(), latro.gathered(policy):
        return latro.gather([worth(i, e) for i, e in latro.share([*enumerate(examples)][some])])


def replies(name: str, model: str, load, reference, codec, examples: list[Example],
            args: latro.Args, flags: argparse.Namespace) -> list[dict]:
    """A record a question, in {out}/{name}.jsonl too: what is there already is not made again."""
    path = Path(args.out, f"{name}.jsonl")
    head = dict(model=model, weights=fingerprint(model), split=flags.split, k=flags.k, L=args.L,
                seed=args.seed, data=args.data, questions=len(examples))
    held = [json.loads(s) for s in path.read_text().split("\n")[:-1]] if path.exists() else []
    done = held[1:] if held[:1] == [head] else []
    dist.barrier()  # all have read before the first one writes
    if latro.is_first():
        path.parent.mkdir(parents=True, exist_ok=True)
        latro.write(path, "".join(json.dumps(r) + "\n" for r in [head, *done]))
    policy = load(model) if len(done) < len(examples) else None
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


def columns(row: dict) -> dict[str, float]:
    """What one question says of a model, by column of the table."""
    samples, gold = row["samples"], row["gold"]
    mean = lambda values: float(np.mean([*values]))
    return {
        "greedy": row["right"], "loose": flexible(row["text"], gold, options(row["question"])),
        "T = 1": mean(s["right"] for s in samples),
        "maj@k": same_answer(majority([s["said"] for s in samples]), gold),
        "pass@k": any(s["right"] for s in samples),
        "log p(y|x)": row["direct"]["answer"] + row["direct"]["end"],
        "log p(y|x+z)": mean(s["logp_y"] for s in samples),
        "ELBO": mean(s["logp_y"] - s["logp_z"] + s["logp0_z"] for s in samples),
        "bound": bound(samples), "z": mean(s["z_len"] for s in samples),
        "ends": mean(s["finished"] for s in samples)}


class Estimate(NamedTuple):
    """A mean over questions and the 95 % interval of the bootstrap over questions (which has no
    width where all questions agree)."""

    mean: float
    low: float
    high: float


def estimates(values: np.ndarray) -> list[Estimate]:
    """One for each column of (questions, columns); the same resamples for every call of a size."""
    n = len(values)
    weights = np.random.default_rng(0).multinomial(n, [1 / n] * n, RESAMPLES) / n
    ends = np.quantile(weights @ values, [0.025, 0.975], axis=0)
    return [Estimate(*map(float, e)) for e in zip(values.mean(0), *ends)]


def mcnemar(before: list[bool], after: list[bool]) -> tuple[int, int, float]:
    """Questions fixed and broken, and the exact two-sided p of such a split if both were as
    likely (McNemar 1947, the binomial form)."""
    fixed = sum(b > a for a, b in zip(before, after))
    broken = sum(a > b for a, b in zip(before, after))
    n, few = fixed + broken, min(fixed, broken)
    tail = sum(math.comb(n, i) for i in range(few + 1))
    return fixed, broken, min(1.0, float(Fraction(2 * tail, 2**n)))


def results(rows: dict[str, list[dict]]) -> dict[str, dict]:
    """By row of the table: its estimates, and what they differ by from the first row's."""
    values = {name: [columns(r) for r in done] for name, done in rows.items()}
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


def cells(found: dict[str, dict], k: int) -> list[list[str]]:
    """The table's text: a line of names, then one for each row."""
    names = [*next(iter(found.values()))["columns"]]
    digits = lambda name: 1 if name == "z" else 3 if name in SHARES else 2
    show = lambda e, d: f"{e.mean:.{d}f} ({e.low:.{d}f} to {e.high:.{d}f})"
    return [["", *(n.replace("@k", f"@{k}") for n in names)],
            *([name, *(show(row["columns"][n], digits(n)) for n in names)]
              for name, row in found.items())]


def table(found: dict[str, dict], k: int) -> str:
    """For a terminal: the interval below the mean."""
    parts = [[text.partition(" (") for text in row] for row in cells(found, k)]
    spans = [[span[:-1].replace(" to ", "..") for *_, span in row] for row in parts]
    lines = [line for row, span in zip(parts, spans) for line in ([mean for mean, *_ in row], span)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = ["  ".join(map(str.rjust, line, widths)).rstrip() for line in lines]
    return "\n".join(filter(None, lines))


def markdown(found: dict[str, dict], k: int) -> str:
    heads, *rest = [[text.replace("|", "\\|") for text in line] for line in cells(found, k)]
    lines = [heads, ["---"] * len(heads), *rest]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


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


def printable(text: str) -> str:
    """The text with all that could steer a terminal, or hide there, spelt out: \\x1b, \\u202e."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


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
    return dict(command=command, names=[*rows], groups=[*GROUPS.values()], table=cells(found, k),
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


def publish(path: str, text: str) -> None:
    try:
        latro.write(Path(path), text)
    except (OSError, ValueError) as e:  # ValueError: no file has such a name
        raise Problem(f"--report {path}: cannot be written ({latro.brief(e)}); name another file"
                      " and run this again: all replies are kept, none is made anew") from e


# ------------------------------------------------------------------------------ 6. main
def evaluation(flags: argparse.Namespace, argv: list[str]) -> None:
    """All rows, the table, and {out}/eval.json with every reply."""
    args, device = settings(flags), latro.connect()
    codec, most = latro.read_codec(args)
    asked = latro.read_rows(args, flags.split)[:flags.questions or None]
    if not asked:
        raise Problem(f"--data {args.data}: no {flags.split} split; see --split")
    examples = latro.encode(codec, most, asked, args)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    @cache
    def load(model: str):
        return latro.load(dataclasses.replace(args, model=model), device, dtype)

    models = [("base", args.model), *([("sft", flags.sft)] if flags.sft else []),
              *((Path(folder).resolve().name, folder) for folder in flags.ckpt)]
    if len(dict(models)) < len(models):
        raise Problem(f"--ckpt {' '.join(flags.ckpt)}: two rows of one name; rename a directory")
    models = dict(models)
    rows = {name: replies(name, model, load, lambda: load(args.model), codec, examples, args, flags)
            for name, model in models.items()}
    found = results(rows)
    latro.say(f"\n{len(examples)} questions of {args.data}, {flags.split}\n")
    latro.say(table(found, flags.k) + "\n")
    for name in [*models][1:]:
        latro.say(verdict(name, "base", found[name]))
    if latro.is_first():
        held = latro.facts() | dict(command=shlex.join(["eval.py", *argv]), models=models,
                                    settings=dataclasses.asdict(args), results=found, rows=rows)
        latro.write(Path(args.out, "eval.json"), json.dumps(held))
        latro.write(Path(args.out, "eval.md"), markdown(found, flags.k))
    after, width = groups(rows), shutil.get_terminal_size().columns
    for i in telling(after)[:flags.show]:
        latro.say(shown(rows, i, after[i], width))
    if flags.report and latro.is_first():
        publish(flags.report, page(content(held["command"], rows, found, flags.k)))


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    return latro.guarded("eval.py", lambda: evaluation(parse(argv), argv))


if __name__ == "__main__":
    sys.exit(main())
