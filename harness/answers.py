"""Grading: what a reply answers, and whether that is the gold answer. Text in, verdict out.

There are two readings, like the two filters of lm-evaluation-harness for GSM8K. `strict`: what
follows the last template on its line. `flexible`: also the last number of the reply or, if gold is
a text, the option it mentions last. If gold is a number, numbers are compared, else texts.

The number that an answer gives is its first, by these rules:
    written as    18, 1,200 (commas group three digits), 3.0, .5, 1/2, 3 1/2, 1e3; digits of any
                  script, at most 99, and 2 in an exponent: so none takes long
    sign          touches it, whatever the dash: -3; "minus 3" and "negative 3" are -3
    around it     words, units, mark-up, currency and % are ignored: about $18.50 a day, 18kg, 50%
    equals sign   what follows the last one counts: 2*9=18 gives 18
    in a word     skipped: B12, CO2, x^2, COVID-19
    after it      other numbers are ignored, and the next sentence: 18 apples in 3 days; 18 (6 each)
    no number     an expression: 3 + 4, 5x3, 10:30, 2^3, 1/0, 18 = 2*9; a negation: not 18;
                  a hedge or a list: 18-20, 18 or 19, between 5 and 6, 18, 19; but 18 or 18.0 is 18
"""

import re
from collections import Counter, deque
from fractions import Fraction
from itertools import islice
from typing import Hashable, Sequence

RULES = 2  # version of the grading rules; raised whenever a verdict can change
TEMPLATE = "The answer is"
TYPOGRAPHY = str.maketrans("\u2010\u2011\u2012\u2013\u2212\uff0d\u2018\u2019\u201c\u201d",
                           "------''\"\"")
TAG = re.compile(r"<[^<>\s\d]*>")  # <|im_end|>, </s>
BOXED = re.compile(r"\\boxed\{(?:\\text\{)?([^{}]*)\}+")
CURRENCY = re.compile(r"(?<!\w)\\?[$€£¥₹] ?(?=[-+]?\.?\d)")
MINUS = re.compile(r"\b(?:minus|negative) (?=\.?\d)", re.I)
SENTENCE = re.compile(r"\n|[.!?;]\s")
# From a digit up to the next space: "5x3" is one figure and does not give 5.
FIGURE = re.compile(r"(?<!\w)(?<!\w[-+*/^.'])[-+]?(?:\d{1,99} (?=\d{1,99}/\d))?\.?\d\S*")
NUMBER = re.compile(r"([-+]?)(?:(\d{1,99}) (?=\d{1,99}/\d))?(?=\.?\d)"
                    r"(\d{1,99}/\d{1,99}|(?:\d{1,3}(?:,\d{3}){1,32}|\d{0,99})(?:\.\d{1,99})?"
                    r"(?:[eE][-+]?\d{1,2})?)(.*)", re.DOTALL)
# Text between two numbers that makes them one expression, or two answers.
EXPRESSION = re.compile(r"(?!\s*\()\W*|.*\b(?:x|plus|times|cdot|divided by)\W*", re.I)
HEDGE = re.compile(r".*\bor\b.*|\W*(?:\w+\W+)?(?:and|to)\W*", re.I)  # not: 3.4, rounded down to 3
NEGATION = re.compile(r"(?:\bnot|n't)\W*$", re.I)


def clean(text: str) -> str:
    """One dash, one quote, no tags, no box, no currency sign in front of a number."""
    text = BOXED.sub(r"\1", TAG.sub(" ", text.translate(TYPOGRAPHY)))
    return MINUS.sub("-", CURRENCY.sub("", text))


def fold(text: str) -> str:
    """A text without case, extra white space, and the quotes, punctuation and mark-up around it."""
    return " ".join(clean(text).casefold().split()).strip(" .,:;!?\"'`*_$()")


def value(figure: str) -> Fraction | None:
    """The number that a figure begins with; None if more digits are attached to it."""
    sign, whole, part, glued = NUMBER.match(figure).groups()
    if glued[:1].isnumeric() or any(map(str.isdecimal, glued)):  # the first: also a superscript, ½
        return None
    try:
        return int(sign + "1") * (Fraction(whole or 0) + Fraction(part.replace(",", "")))
    except ZeroDivisionError:
        return None


def number_in(text: str, last: bool = False) -> Fraction | None:
    """The first number of a text by the rules above, or the last, after any equals sign."""
    text = clean(text).replace("=", "\n") if last else clean(text)
    sentences = filter(FIGURE.search, SENTENCE.split(text)[::-1 if last else 1])
    clause = next(sentences, "").rpartition("=")[2]
    near = deque(islice(FIGURE.finditer(clause), None if last else 2), 2)
    said = [value(figure[0]) for figure in near]
    if len(near) == 2:
        gap = clause[near[0].end():near[1].start()]
        if EXPRESSION.fullmatch(gap) or HEDGE.fullmatch(gap) and said[0] != said[1]:
            return None
    return said[-last] if near and not NEGATION.search(clause[:near[-last].start()]) else None


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
    """Compares numbers if gold is one, else folded texts. Nothing equals an empty gold."""
    number = as_number(gold)
    return fold(said) == fold(gold) != "" if number is None else number_in(said) == number


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


def canonical(said: str, numeric: bool = True) -> Hashable:
    """The form by which votes are counted: the number, else the folded text, "" for no answer.
    `numeric` is False if gold is a text, so that "2 mL" is not "2 km"."""
    number = number_in(said) if numeric else None
    return fold(said) if number is None else number


def majority(answers: list[str], numeric: bool = True) -> str:
    """The most frequent answer by canonical form, as first spelled; of a tie, the one given first.
    Empty answers do not vote, other answers without a number do. "" if there is no answer."""
    forms = [canonical(answer, numeric) for answer in answers]
    votes = Counter(form for form in forms if form != "")
    return answers[forms.index(votes.most_common(1)[0][0])] if votes else ""
