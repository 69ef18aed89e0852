"""Results for a reader: before and after a run, tables, replies side by side, an HTML page.

found: by row of the table, dict(columns=, gain=, mcnemar=) as eval.results makes it; rows: by row
of the table, the records of latro.evaluate.
"""

import json
import re
import textwrap
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path

from .answers import TEMPLATE
from .checkpoint import atomic_write, read_jsonl
from .errors import UserError, printable, short_error
from .statistics import Estimate

HEADLINES = ("elbo", "ELBO"), ("logp_y", "log p(y|x+z)"), ("kl", "KL"), ("z_len", "length")
PARTS = "template", "answer", "end"  # of what the model is asked to say after a rationale
TABLES = (("greedy", "loose", "sampled", "maj@k", "pass@k"),
          ("log p(y|x)", "log p(y|x+gold)", "log p(y|x+other)", "log p(y|x+z)"),
          ("log mean p(y|x+z)", "per token", "ELBO", "bound"),
          ("z", "ends", *PARTS), ("reaches", "follows", "r ~ right", "entropy", "unique"))
OUTCOMES = {(False, True): "fixed", (True, False): "broken", (True, True): "both right",
            (False, False): "both wrong"}  # by the greedy replies of the first row and of the last
PAGE = Path(__file__).with_name("report.html")


# ------------------------------------------------------------------------------ a run
def how_rationales_end(means: dict) -> str:
    """One line before training: where the policy never writes the template, little is learned."""
    by_template = means["finished"] - means["eos"]
    line = (f"rationales end by the template {by_template:.0%}, EOS {means['eos']:.0%},"
            f" L {1 - means['finished']:.0%}")
    if by_template < 0.5:
        line += (f': few write "{TEMPLATE}"; try --shots 4, a --prompt that asks for it, a larger'
                 " --L, or SFT first")
    return line


def before_and_after(out: Path) -> str:
    """What a run has changed on its held-out questions: metrics, and three replies."""
    evals, samples = (read_jsonl(out / f"{name}.jsonl") for name in ("evals", "samples"))
    rows = [evals[0], evals[-1]]
    looks = [r for r in samples if r["split"] == "held-out"]
    lines = [f"\n{rows[0]['n']:4} held-out questions     before   after"]
    for k, name in (("greedy", "greedy accuracy"), ("sampled", "accuracy of a sample"), *HEADLINES):
        values = ("       -" if r[k] is None else f"{r[k]:8.3f}" for r in rows)
        lines.append(f"{name:24}" + "".join(values))
    for a, b in zip(looks[0]["questions"], looks[-1]["questions"]):
        lines.append(f"\n{a['question']}  [{a['gold']}]\n  before: {a['text']}\n"
                     f"  after:  {b['text']}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------ tables
def digits(name: str, value: float | None) -> str:
    """A number of a column as text."""
    places = 1 if name == "z" else 2 if name in (*TABLES[1], *TABLES[2], *PARTS) else 3
    return "-" if value is None else f"{value:.{places}f}"


def cells(found: dict[str, dict], k: int, temperature: float) -> list[list[list[tuple[str, str]]]]:
    """The tables' text: by table and line, (mean, interval); the first line has the names."""
    heads = {"sampled": f"T = {temperature:g}", "maj@k": f"maj@{k}", "pass@k": f"pass@{k}"}

    def cell(name: str, e: Estimate) -> tuple[str, str]:
        mean, low, high = (digits(name, value) for value in e)
        return mean, "" if low == "-" else f"{low} to {high}"

    return [[[("", ""), *((heads.get(n, n), "") for n in names)],
             *([(row, ""), *(cell(n, of["columns"][n]) for n in names)]
               for row, of in found.items())] for names in TABLES]


def table(found: dict[str, dict], k: int, temperature: float = 1.0) -> str:
    """For a terminal: the interval is below the mean."""
    def lines(rows: list[list[tuple[str, str]]]) -> Iterator[str]:
        flat = [line for row in rows for line in zip(*row) if any(line)]
        widths = [max(map(len, column)) for column in zip(*flat)]
        yield from ("  ".join(map(str.rjust, line, widths)).rstrip() for line in flat)
    return "\n\n".join("\n".join(lines(rows)) for rows in cells(found, k, temperature))


def markdown(found: dict[str, dict], k: int, temperature: float = 1.0) -> str:
    """The same tables in Markdown, the interval in brackets."""
    def line(texts: list[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |\n"

    def lines(rows: list[list[tuple[str, str]]]) -> str:
        heads, *rest = [[f"{mean} ({span})" if span else mean for mean, span in row]
                        for row in rows]
        return "".join(map(line, [heads, ["---"] * len(heads), *rest]))
    return "\n".join(map(lines, cells(found, k, temperature)))


def verdict(name: str, base: str, row: dict) -> str:
    """The paired comparison of greedy replies, in a sentence."""
    fixed, broken, p = row["mcnemar"]
    gain = row["gain"]["greedy"]
    return (f"{name} - {base}, greedy, same questions: {gain.mean:+.3f} ({gain.low:+.3f} to"
            f" {gain.high:+.3f}); {fixed} fixed, {broken} broken, McNemar's exact p = {p:.2g}")


# ------------------------------------------------------------------------------ replies: --show
def outcomes(rows: dict[str, list[dict]]) -> list[str]:
    """What became of each question between the first row and the last: one of OUTCOMES."""
    first, *_, last = rows.values()
    return [OUTCOMES[before["right"], after["right"]] for before, after in zip(first, last)]


def most_informative_first(found: list[str]) -> list[int]:
    """The order in which to show questions: fixed and broken in turn, then the others."""
    seen, places = Counter(), []
    for i, outcome in enumerate(found):
        places.append((outcome.startswith("both"), seen[outcome], i))
        seen[outcome] += 1
    return [i for *_, i in sorted(places)]


def wrapped(text: str, width: int) -> list[str]:
    lines = printable(text).split("\n")
    return [part for line in lines for part in textwrap.wrap(line, max(1, width)) or [""]]


def side_by_side(texts: list[str], width: int) -> str:
    """Texts as columns of equal width."""
    column = (width - 3 * (len(texts) - 1)) // len(texts)
    lines = zip_longest(*(wrapped(text, column) for text in texts), fillvalue="")
    return "\n".join(" | ".join(part.ljust(column) for part in line).rstrip() for line in lines)


def show(rows: dict[str, list[dict]], i: int, outcome: str, width: int) -> str:
    """Question i, and what base, SFT and the last row reply: greedy, and the first sample."""
    names = [name for name in rows if name in (next(iter(rows)), "sft", [*rows][-1])]
    own = [rows[name][i] for name in names]

    def word(reply: dict) -> str:
        return "right" if reply["right"] else "wrong"
    greedy = [f"{name}\n\ngreedy: {word(r)}\n{r['text']}" for name, r in zip(names, own)]
    sampled = [f"sampled: {word(s)}, r {s['reward']:.2f} nats\n{s['text']}"
               for s in (r["samples"][0] for r in own)]
    question = wrapped(f"{own[0]['question']} [{own[0]['gold']}]", width)
    parts = *question, "", side_by_side(greedy, width), "", side_by_side(sampled, width)
    return "\n".join(["", f"question {i + 1}: {outcome}", *parts])


# ------------------------------------------------------------------------------ page: --report
def content(command: str, rows: dict[str, list[dict]], found: dict[str, dict], k: int,
            temperature: float = 1.0) -> dict:
    """What the page shows. Numbers are text, which also holds what JSON cannot: -inf."""
    def reply(r: dict) -> dict:
        direct = r["direct"]["answer"] + r["direct"]["end"]
        return dict(
            text=r["text"], right=r["right"], direct=f"{direct:.2f}",
            samples=[[s["text"], s["right"], f"{s['reward']:.2f}", f"{s['logp_y']:.2f}", s["z_len"]]
                     for s in r["samples"]])

    first, *others = rows
    questions = [
        dict(question=own[0]["question"], gold=own[0]["gold"], group=outcome,
             rows=[*map(reply, own)])
        for outcome, *own in zip(outcomes(rows), *rows.values())]
    return dict(command=command, names=[*rows], groups=[*OUTCOMES.values()],
                tables=cells(found, k, temperature),
                verdicts=[verdict(name, first, found[name]) for name in others],
                questions=questions)


def embed(what: dict) -> str:
    """JSON that no text in it can end: ASCII alone, without <, > and &."""
    text = json.dumps(what, separators=(",", ":"))
    return re.sub("[<>&]", lambda c: f"\\u{ord(c[0]):04x}", text)


def page(what: dict) -> str:
    """One HTML file that fetches nothing. Its policy names its script and style by their hashes, so
    a browser runs no other, whatever a reply contains."""
    template = PAGE.read_text(encoding="utf-8")

    def digest(tag: str) -> str:
        inside = re.search(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[1]
        return b64encode(sha256(inside.encode()).digest()).decode()

    parts = dict(data=embed(what), script=digest("script"), style=digest("style"))
    return re.sub(r"{{(\w+)}}", lambda place: parts[place[1]], template)  # once: data may hold {{


def write_page(path: str, text: str) -> None:
    """Raises UserError where the file cannot be written."""
    try:
        atomic_write(Path(path), text)
    except (OSError, ValueError) as e:  # ValueError: no file can have such a name
        raise UserError(f"--report {path}: cannot be written ({short_error(e)}); name another file"
                        " and run this again: all replies are kept, none is made anew") from e
