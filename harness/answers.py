"""Grading: what a reply answers, and whether that is the gold answer. Text in, verdict out.

There are two readings, like the two filters of lm-evaluation-harness for GSM8K. `strict`: what
follows the last template on its line. `flexible`: also the last number of the reply or, if gold is
a text, the option it mentions last. If gold is a number, numbers are compared, else texts.

The number that an answer gives is its first, by these rules:
    written as    18, 1,200 (commas group three digits), 3.0, .5, 1/2, 3 1/2, 3 and a half, 1e3;
                  digits of any script, at most 99, and 2 in an exponent: so none takes long
    sign          touches it, whatever the dash: -3; "minus 3" and "negative 3" are -3
    around it     words, units, mark-up, currency and % are ignored: about $18.50 a day, 18kg, 50%;
                  a million is a unit too, as in GSM8K; LaTeX counts as it is printed
    equals sign   what follows the last one counts: 2*9=18 gives 18
    in a word     skipped: B12, CO2, x^2, COVID-19; and under a root
    after it      other numbers are ignored, and the next sentence: 18 apples in 3 days; 18 (6 each)
    no number     an expression: 3 + 4, 5x3, 10:30, 2^3, 1/0, 18 = 2*9; a negation: not 18;
                  a hedge or a list: 18-20, 18 or 19, between 5 and 6, 18, 19; but 18 or 18.0 is 18;
                  a part of one: 7 apples and a half

The text that an answer gives is its first sentence; if gold has several, the whole. Case, mark-up
and the dash of a list do not count.
"""

import re
from collections import Counter, deque
from fractions import Fraction
from itertools import islice
from typing import Hashable, Sequence

from .plain_text import plain_text

RULES = 2  # version of the grading rules; raised whenever a verdict can change
TEMPLATE = "The answer is"
CURRENCY = re.compile(r"(?<!\w)\\?[$€£¥₹] ?(?=[-+]?\.?\d)")
MINUS = re.compile(r"\b(?:minus|negative) (?=\.?\d)", re.I)
COUNTS = {"a": 1, "one": 1, "two": 2, "three": 3}
PARTS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4}
AND_PART = re.compile(rf"(?<=\d)[ -]and[ -]({'|'.join(COUNTS)})[ -]({'|'.join(PARTS)})s?(?![\w-])",
                      re.I)
AND_FRACTION = re.compile(r"(?<=\d) and (?=\d{1,99}/\d)")
AND_A_HALF = re.compile(r"\band (?:a|one) half(?![\w-])", re.I)
SENTENCE = re.compile(r"\n|[.!?;][\"')\]*]*\s")
LEAD = re.compile(r"(?:[\s.,:;!?\"'`*$()]|[-\u2022](?=\s))*")  # also the dash of a list
# From a digit up to the next space: "5x3" is one figure and does not give 5.
FIGURE = re.compile(r"(?<![\w√])(?<!√[({])(?<![\w)][-+*/^.'])[-+]?"
                    r"(?:\d{1,99} (?=\d{1,99}/\d))?\.?\d\S*")
NUMBER = re.compile(r"([-+]?)(?:(\d{1,99}) (?=\d{1,99}/\d))?(?=\.?\d)"
                    r"(\d{1,99}/\d{1,99}|(?:\d{1,3}(?:,\d{3}){1,32}|\d{0,99})(?:\.\d{1,99})?"
                    r"(?:[eE][-+]?\d{1,2})?)(.*)", re.DOTALL)
# Text between two numbers that makes them one expression, or two answers.
EXPRESSION = re.compile(r"(?!\s*\()\W*|.*\b(?:x|plus|times|cdot|div|pm|divided by)\W*", re.I)
HEDGE = re.compile(r".*\bor\b.*|\W*(?:\w+\W+)?(?:and|to)\W*", re.I)  # not: 3.4, rounded down to 3
NEGATION = re.compile(r"(?:\bnot|n't)\W*$", re.I)


def clean(text: str) -> str:
    """Plain text, without a currency sign in front of a number and with its sign and fraction."""
    text = AND_PART.sub(lambda m: f" {COUNTS[m[1].lower()]}/{PARTS[m[2].lower()]}",
                        MINUS.sub("-", CURRENCY.sub("", plain_text(text))))
    return AND_FRACTION.sub(" ", text)


def fold(text: str) -> str:
    """A text without case, extra white space, and the quotes, punctuation and mark-up around it."""
    text = " ".join(clean(text).casefold().split())
    return text[LEAD.match(text).end():].rstrip(" .,:;!?\"'`*$()")


def sentences(text: str) -> list[str]:
    """The sentences that say anything."""
    return list(filter(fold, SENTENCE.split(plain_text(text))))


def value(figure: str) -> Fraction | None:
    """The number that a figure begins with; None if more digits, or a root, are attached to it."""
    sign, whole, part, glued = NUMBER.match(figure).groups()
    if glued[:1].isnumeric() or glued[:1] == "√" or any(map(str.isdecimal, glued)):
        return None  # isnumeric: also a superscript
    try:
        return int(sign + "1") * (Fraction(whole or 0) + Fraction(part.replace(",", "")))
    except ZeroDivisionError:
        return None


def number_in(text: str, last: bool = False) -> Fraction | None:
    """The first number of a text by the rules above, or the last, after any equals sign."""
    text = clean(text).replace("=", "\n") if last else clean(text)
    found = filter(FIGURE.search, SENTENCE.split(text)[::-1 if last else 1])
    clause = next(found, "").rpartition("=")[2]
    near = deque(islice(FIGURE.finditer(clause), None if last else 2), 2)
    if not near:
        return None
    said = [value(figure[0]) for figure in near]
    chosen, after = near[-last], clause[near[-last].end():]
    if len(near) == 2:
        gap = clause[near[0].end():near[1].start()]
        if EXPRESSION.fullmatch(gap) or HEDGE.fullmatch(gap) and said[0] != said[1]:
            return None
        after = after if last else gap
    if NEGATION.search(clause[:chosen.start()]) or AND_A_HALF.search(after):
        return None
    return said[-last]


def as_number(gold: str) -> Fraction | None:
    """The number that a gold answer is, without currency and %; None for a text or with a unit."""
    found = NUMBER.match(clean(gold).strip().rstrip(" .%$€£¥₹"))
    return value(found[0]) if found and not found[4] else None


def last_mention(text: str, options: Sequence[str], end: str = "") -> str:
    """The last option in a text, as whole words that are neither negated nor part of a longer one:
    neither "salt water" nor "not water" mentions "water". `end` is a pattern of what follows."""
    names = "|".join(map(re.escape, sorted(map(fold, options), key=len, reverse=True)))
    mention = rf"(?<![\w-])(?<!\d[.,])(not (?:the |an? )?)?({names})(?![\w/^-]|[.,]\d){end}"
    return ([""] + [m[2] for m in re.finditer(mention, fold(text)) if not m[1]])[-1]


def answer_in(text: str) -> str:
    """What a reply answers: the rest of the line after its last template, or nothing."""
    return text.rpartition(TEMPLATE)[2].split("\n")[0].strip() if TEMPLATE in text else ""


def same_answer(said: str, gold: str) -> bool:
    """Whether an answer says what gold says. Nothing equals an empty gold."""
    return canonical(said, gold) == canonical(gold, gold) != ""


def strict(text: str, gold: str) -> bool:
    return same_answer(answer_in(text), gold)


def flexible(text: str, gold: str, options: Sequence[str] = ()) -> bool:
    """Strictly right; or the last number is right; or the last option; or, without options, the
    last words."""
    number = as_number(gold)
    if number is not None:
        return strict(text, gold) or number_in(text, last=True) == number
    mentioned = last_mention(text, options or [gold], "" if options else r"\Z")
    return strict(text, gold) or mentioned == fold(gold) != ""


def canonical(said: str, gold: str) -> Hashable:
    """The form by which answers are compared and votes counted, "" for no answer. Of gold only the
    kind matters: for a number it is the number, if the answer gives one; for a text of one sentence
    the folded first sentence; else the folded text."""
    if as_number(gold) is not None:
        number = number_in(said)
        return fold(said) if number is None else number
    if len(sentences(gold)) > 1:
        return fold(said)
    return fold(next(iter(sentences(said)), ""))


def majority(answers: list[str], gold: str) -> str:
    """The most frequent answer by canonical form, as first spelled; of a tie, the one given first.
    Empty answers do not vote, other answers without a number do. "" if there is no answer."""
    forms = [canonical(answer, gold) for answer in answers]
    votes = Counter(form for form in forms if form != "")
    return answers[forms.index(votes.most_common(1)[0][0])] if votes else ""
