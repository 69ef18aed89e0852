"""Text as a reader sees it: without LaTeX, mark-up and the marks of GSM8K's calculator."""

import re
import unicodedata

DEPTH = 9  # of nested braces
TYPOGRAPHY = str.maketrans("\u2010\u2011\u2012\u2013\u2212\uff0d\u2018\u2019\u201c\u201d\u2044",
                           "------''\"\"/")
VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")  # a fraction that is one character: ½
TAG = re.compile(r"<[^<>\s\d]*>")  # <|im_end|>, </s>
CALCULATION = re.compile(r"<<[^<>\n]*>>(?=[-+$.]*\d)")  # <<9*2=18>>18
EMPHASIS = re.compile(r"(?<![^\W_])_+|_+(?![^\W_])")  # __18__, but not x_1
SYMBOLS = [(re.compile(pattern), text) for pattern, text in (
    (r"\{,\}|(?<=\d)\\,(?=\d{3}(?!\d))", ","), (r"\\!", ""), (r"\\(?:[,;: ()\[\]]|q?quad\b)", " "),
    (r"\\(?:left|right)(?![a-z])", ""), (r"\\([%$&#_])", r"\1"),
    (r"\^?\{?\\circ(?![a-z])\}?", "\u00b0"), (r"\\sqrt(?:\[([^\[\]]*)\])?", "\\1\u221a"))]
FONT = re.compile(r"(?:\\(?:boxed|[fmh]box|emph|underline|operatorname|text[a-z]*|math[a-z]*)\s*|"
                  r"(?<![\w\\^}]))\{([^{}]*)\}")
SCRIPT = re.compile(r"([\^_])\{([^{}]*)\}")
FRACTION = re.compile(r"(\d?)\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\w))\s*(?:\{([^{}]*)\}|(\w))")


def fraction(found: re.Match) -> str:
    r"""A \frac as a/b, after a space if a number precedes: 3 1/2. Sums get parentheses."""
    before, *operands = found.groups(default="")
    over, under = ("".join(pair).strip() for pair in (operands[:2], operands[2:]))
    over, under = (t if re.fullmatch(r"-?[\w.,$]+", t) else f"({t})" for t in (over, under))
    return f"{before} {over}/{under}" if before else f"{over}/{under}"


def without_latex(text: str) -> str:
    """Numbers and words as LaTeX prints them, from the inside out. Unknown commands stay."""
    for pattern, printed in SYMBOLS:
        text = pattern.sub(printed, text)
    for _ in range(DEPTH):
        inner = FRACTION.sub(fraction, SCRIPT.sub(r"\1\2", FONT.sub(r"\1", text)))
        if inner == text:
            break
        text = inner
    return text


def plain_text(text: str) -> str:
    """One dash, one quote, fractions as 1/2; no LaTeX, no tags, no underscores around a word.
    Characters that can be written in two ways are written in one (Unicode's NFC)."""
    text = unicodedata.normalize("NFC", text)
    text = VULGAR.sub(lambda c: " " + unicodedata.normalize("NFKC", c[0]), text)
    text = TAG.sub(" ", CALCULATION.sub("", text.translate(TYPOGRAPHY)))
    return EMPHASIS.sub("", without_latex(text) if re.search(r"[\\{]", text) else text)
