"""Proves that answers are graded as a reader would grade them.

Tables of replies, properties of arbitrary text, the real data sets, and a comparison with
lm-evaluation-harness's own GSM8K filters.

    pip install hypothesis                for the properties
    pip install --no-deps lm-eval         for its filters; they import only numpy
"""

import json
import random
import re
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from conftest import ROOT
from harness.answers import (TEMPLATE, answer_in, as_number, canonical, flexible, fold, majority,
                             number_in, same_answer, strict)

DATA = ROOT.parent / "shared" / "data"  # the two data sets, if present
YES, NO = True, False


def rows(task):
    """The rows of all splits. Skips the test if there are none."""
    files = sorted((DATA / task).glob("*.jsonl"))
    if not files:
        pytest.skip(f"{DATA / task} is not there")
    return [json.loads(line) for f in files for line in f.open(encoding="utf-8")]


# ---- replies: "~" stands for the template; the verdicts are strict, flexible

REPLIES = [
    # as in training
    ("Monday 3 + 4 = 7. ~ 7.", "7", YES, YES),
    ("Monday 3 + 4 = 7. ~ 8.", "7", NO, NO),
    ("~ 18.", "18", YES, YES), ("~ 18", "18", YES, YES), ("~ 180.", "18", NO, NO),
    ("~ 18.", "180", NO, NO), ("~ -3.", "-3", YES, YES), ("~ 3.", "-3", NO, NO),
    # template: absent, twice, at the end, in lower case, before a newline, in mark-up
    ("", "18", NO, NO), (" \n\t", "18", NO, NO), ("...!?", "18", NO, NO), ("~", "18", NO, NO),
    ("~.", "18", NO, NO), ("~ =", "18", NO, NO), ("~ unknown", "18", NO, NO),
    ("18", "18", NO, YES), ("9 + 9 = 18", "18", NO, YES), ("So it is 18. ~", "18", NO, YES),
    ("In 3 days 5 hens lay 18.", "18", NO, YES), ("In 3 days 5 hens lay 18.", "5", NO, NO),
    ("~ 5. No. ~ 18.", "18", YES, YES), ("~ 18. No. ~ 5.", "18", NO, NO),
    ("~ ~ 18.", "18", YES, YES), ("the answer is 18.", "18", NO, YES),
    ("~\n18.", "18", NO, YES), ("~:\n18.", "18", NO, YES),
    ("~ 18.\nThe end of 3 days", "18", YES, YES),
    ("~: 18.", "18", YES, YES), ("**~ 18.**", "18", YES, YES), ("**~** 18.", "18", YES, YES),
    ("~ 18.\r\nBye", "18", YES, YES), ("The answer isn't 18.", "18", NO, NO),
    # spelling of numbers
    ("~ 1,200.", "1200", YES, YES), ("~ 1200.", "1,200", YES, YES),
    ("~ 1200.", " 1,200 ", YES, YES),
    ("~ 1,234,567.", "1234567", YES, YES), ("~ 1,20.", "120", NO, NO),
    ("~ 12,3456.", "123456", NO, NO), ("~ 1.200.000.", "1200000", NO, NO),
    ("~ 18.0.", "18", YES, YES), ("~ 18.5.", "18", NO, NO), ("~ .5.", "0.5", YES, YES),
    ("~ 0.5.", ".5", YES, YES), ("~ -.5.", "-0.5", YES, YES), ("~ 1/2.", "0.5", YES, YES),
    ("~ 0.5.", "1/2", YES, YES), ("~ 3 1/2.", "3.5", YES, YES), ("~ -3 1/2.", "-3.5", YES, YES),
    ("~ 3.5.", "3 1/2", YES, YES), ("~ 1e3.", "1000", YES, YES), ("~ 1e-2.", "0.01", YES, YES),
    ("~ 1e999999999.", "1", NO, NO), ("~ 1e-999.", "1", NO, NO), ("~ 007.", "7", YES, YES),
    ("~ \uff11\uff18.", "18", YES, YES), ("~ \u0661\u0668.", "18", YES, YES),
    ("~ 3\u00bd.", "3", NO, NO), ("~ 10\u00b2.", "10", NO, NO), ("~ 1_8.", "18", NO, NO),
    ("~ " + "9" * 5000, "9", NO, NO), ("~ 1/" + "0" * 99 + "1.", "1", NO, NO),
    # sign
    ("~ 0.", "0", YES, YES), ("~ -0.", "0", YES, YES), ("~ 0.", "-0", YES, YES),
    ("~ \u22123.", "-3", YES, YES), ("~ -3.", "\u22123", YES, YES), ("~ \u20133.", "-3", YES, YES),
    ("~ +3.", "3", YES, YES), ("~ 1.", "+1", YES, YES), ("~ minus 3.", "-3", YES, YES),
    ("~ minus 3.", "3", NO, NO), ("~ negative $3.", "-3", YES, YES), ("~ -$5.", "-5", YES, YES),
    ("~ $-5.", "-5", YES, YES), ("~ -$5.", "5", NO, NO), ("~ - 3.", "3", YES, YES),
    # what may surround a number
    ("~ $18.", "18", YES, YES), ("~ 18 $.", "18", YES, YES), ("~ 18.50\u20ac.", "18.5", YES, YES),
    ("~ US$ 18.", "18", YES, YES), ("~ 50%.", "50", YES, YES), ("~ 50%.", "0.5", NO, NO),
    ("~ 50.", "50%", YES, YES), ("~ 18.", "$18.00", YES, YES), ("~ 18 apples.", "18", YES, YES),
    ("~ 18kg.", "18", YES, YES), ("~ 18-year-old.", "18", YES, YES),
    ("~ about 18.", "18", YES, YES),
    ("~ about $18.50 a day.", "18.5", YES, YES), ("~ (18).", "18", YES, YES),
    ("~ \"18\".", "18", YES, YES), ("~ **18**.", "18", YES, YES), ("~ `18`", "18", YES, YES),
    ("~ $18$.", "18", YES, YES), ("~ \\boxed{18}.", "18", YES, YES),
    ("~ $\\boxed{\\$18}$.", "18", YES, YES), ("~ 18<|im_end|>", "18", YES, YES),
    ("~ 18.</s>", "18", YES, YES), ("~ 18! 3 left", "18", YES, YES),
    ("~ approx. 18.", "18", YES, YES),
    # several numbers: the first counts, unless hedged
    ("~ 18 apples in 3 days.", "18", YES, YES), ("~ 18 apples in 3 days.", "3", NO, YES),
    ("~ 18 (6 for each).", "18", YES, YES), ("~ 18. That leaves 5.", "18", YES, YES),
    ("~ 18 apples. Check: 18 - 3 = 15.", "18", YES, YES), ("~ 18, not 19.", "18", YES, YES),
    ("~ 18 apples for 3 or 4 days.", "18", YES, YES), ("~ 18 or 18.0.", "18", YES, YES),
    ("~ 18 or 19.", "18", NO, NO), ("~ 18 or 19.", "19", NO, NO), ("~ 18 (or 19).", "18", NO, NO),
    ("~ 18 or perhaps 19.", "18", NO, NO), ("~ 18 apples or 19.", "18", NO, NO),
    ("~ 18-20.", "18", NO, NO), ("~ 18 - 20.", "20", NO, NO), ("~ 18\u201320.", "18", NO, NO),
    ("~ 18 \u2014 20.", "18", NO, NO), ("~ 18kg-20kg.", "18", NO, NO),
    ("~ 18 to 20.", "18", NO, NO),
    ("~ 18.4, which rounds down to 18.", "18", NO, YES), ("~ 5 kg to 6 kg.", "5", NO, NO),
    ("~ between 5 and 6.", "5", NO, NO), ("~ between 5 and 6.", "6", NO, NO),
    ("~ 5 apples and 6 pears.", "5", NO, NO), ("~ 18, 19.", "18", NO, NO),
    ("~ 18 19.", "18", NO, NO), ("~ not 18.", "18", NO, NO), ("~ NOT $18.", "18", NO, NO),
    ("~ not 18 but 19.", "18", NO, NO), ("~ not 18 but 19.", "19", NO, YES),
    # "=" and unevaluated expressions
    ("~ 2*3=6.", "6", YES, YES), ("~ 2*3=6.", "2", NO, NO), ("~ 2*3=6.", "3", NO, NO),
    ("~ 5 - 3 = 2.", "2", YES, YES), ("~ 1 + 1 = 4 / 2 = 2.", "2", YES, YES),
    ("~ x = 18.", "18", YES, YES), ("~ 6 = 2*3.", "6", NO, NO), ("~ 6 = 2*3.", "3", NO, NO),
    ("~ 18 = the sum.", "18", NO, YES), ("~ 2*3 = ?", "3", NO, NO), ("~ 5-3.", "5", NO, NO),
    ("~ 5-3.", "3", NO, NO), ("~ 5 - 3.", "5", NO, NO), ("~ 3 + 4.", "3", NO, NO),
    ("~ 3 + 3.", "3", NO, NO), ("~ 3 + 4.", "4", NO, NO), ("~ 3+4.", "7", NO, NO),
    ("~ 10:30.", "10", NO, NO), ("~ 5x3.", "5", NO, NO), ("~ 5 x 3.", "5", NO, NO),
    ("~ 5 \u00d7 3.", "3", NO, NO), ("~ 5 cm x 3 cm.", "5", NO, NO), ("~ 2^3.", "2", NO, NO),
    ("~ 3 times 3.", "3", NO, NO), ("~ 9 divided by 3.", "9", NO, NO),
    ("~ 2 * (3 + 4).", "2", NO, NO),
    ("~ 1/0.", "1", NO, NO), ("~ 1/0.", "0", NO, NO), ("~ 1.5/2.", "1.5", NO, NO),
    ("~ 3/4/2020.", "3", NO, NO), ("~ 1/2.5.", "0.5", NO, NO), ("~ 7.", "1/0", NO, NO),
    # digits inside a word
    ("~ B12.", "12", NO, NO), ("~ x2.", "2", NO, NO), ("~ CO2.", "2", NO, NO),
    ("~ COVID-19.", "19", NO, NO), ("~ 18 m^2.", "18", YES, YES), ("~ 18 of B12.", "18", YES, YES),
    ("~ x^2.", "2", NO, NO), ("~ H2O, 18.", "18", YES, YES), ("~ 18cm\u00b3.", "18", YES, YES),
    # a text: exact except for case, white space, and what surrounds it
    ("~ water.", "water", YES, YES), ("~ Water.", "water", YES, YES),
    ("~ water", "water.", YES, YES),
    ("~ \"water\".", "water", YES, YES), ("~ \u201cwater.\u201d", "water", YES, YES),
    ("~ **water**.", "water", YES, YES), ("~ \\boxed{water}.", "water", YES, YES),
    ("~ \\boxed{\\text{water}}.", "water", YES, YES), ("~ water.<|eot_id|>", "water", YES, YES),
    ("~ salt  water.", "salt water", YES, YES), ("~ salt\u00a0water.", "salt water", YES, YES),
    ("~ the sun\u2019s light.", "the sun's light", YES, YES), ("~ underwater.", "water", NO, NO),
    ("~ salt water.", "water", NO, YES), ("~ water.", "salt water", NO, NO),
    ("~.", "water", NO, NO),
    ("~ 9.8 m/s.", "9.8 m/s", YES, YES), ("~ 9.8 m/s.", "9.8 m/s.", YES, YES),
    ("~ 9.8.", "9.8 m/s", NO, NO), ("~ 9.80 m/s.", "9.8 m/s", NO, NO),
    ("~ -3\u00b0C.", "3\u00b0C", NO, NO),
    ("~ \u22123\u00b0C.", "-3\u00b0C", YES, YES), ("~ 10:30.", "10:30", YES, YES),
    ("~ 5-3.", "5-3", YES, YES), ("~ 1 2.", "1 2", YES, YES),
    ("~ Students 1 and 3.", "Students 1 and 3", YES, YES),
    # a text without options: flexible accepts a reply that ends with it
    ("It must be water.", "water", NO, YES), ("It must be **Water**!", "water", NO, YES),
    ("It must be saltwater.", "water", NO, NO), ("It must be salt-water.", "water", NO, NO),
    ("It must not be water.", "water", NO, YES), ("It is not water.", "water", NO, NO),
    ("Water it must be.", "water", NO, NO), ("water", "", NO, NO), ("~ .", "", NO, NO),
    # LaTeX, as it is printed
    ("~ \\boxed{\\frac{1}{2}}.", "0.5", YES, YES), ("~ $\\frac{1}{2}$.", "0.5", YES, YES),
    ("~ \\boxed{\\frac{1}{2}}.", "1", NO, NO), ("~ \\boxed{\\frac{1}{2}}.", "2", NO, NO),
    ("~ \\dfrac12.", "1/2", YES, YES), ("~ -\\frac{1}{2}.", "-0.5", YES, YES),
    ("~ -\\frac{1}{2}.", "0.5", NO, NO), ("~ \\frac{-1}{2}.", "-0.5", YES, YES),
    ("~ 3\\frac{1}{2}.", "3.5", YES, YES), ("~ 3\\frac{1}{2}.", "3", NO, NO),
    ("~ \\frac{36}{2}.", "18", YES, YES), ("~ \\frac{1}{2}.", "\\frac{1}{2}", YES, YES),
    ("~ 0.5.", "$\\frac{1}{2}$", YES, YES), ("~ \\frac{3 + 4}{2}.", "2", NO, NO),
    ("~ \\frac{a + b}{2}.", "2", NO, NO), ("~ \\frac{\\frac{1}{2}}{3}.", "3", NO, NO),
    ("~ 70{,}000.", "70000", YES, YES), ("~ $70,\\!000$.", "70000", YES, YES),
    ("~ 70\\,000.", "70000", YES, YES), ("~ 70{,}000.", "70", NO, NO),
    ("~ 70{,}00.", "7000", NO, NO), ("~ 18\\,km.", "18", YES, YES),
    ("~ 18\\,\\text{km}.", "18", YES, YES), ("~ \\(18\\).", "18", YES, YES),
    ("So\n\\[\n\\boxed{18}\n\\]", "18", NO, YES), ("~ \\boxed{\\text{18 apples}}.", "18", YES, YES),
    ("~ \\boxed{\\mathbf{18}}.", "18", YES, YES), ("~ \\textbf{18}.", "18", YES, YES),
    ("~ \\boxed{{18}}.", "18", YES, YES), ("~ \\boxed{18", "18", YES, YES),
    ("~ \\boxed{\\$1{,}800}.", "1800", YES, YES), ("~ 18\\%.", "18", YES, YES),
    ("~ 18^\\circ.", "18", YES, YES), ("~ 18^{\\circ}\\mathrm{C}.", "18", YES, YES),
    ("~ x^{2}.", "2", NO, NO), ("~ 2^{10}.", "2", NO, NO), ("~ a_{18}.", "18", NO, NO),
    ("~ 18 \\text{ m}^{2}.", "18", YES, YES), ("~ 2 \\times 9.", "2", NO, NO),
    ("~ 2 \\times 9 = 18.", "18", YES, YES), ("~ 36 \\div 2.", "36", NO, NO),
    ("~ 18 \\pm 2.", "18", NO, NO), ("~ \\sqrt{18}.", "18", NO, NO), ("~ 3\\sqrt{2}.", "3", NO, NO),
    ("~ \u221a18.", "18", NO, NO), ("~ \\sqrt[3]{8}.", "3", NO, NO),
    ("~ \\sqrt{324} = 18.", "18", YES, YES),
    ("~ \\boxed{\\textbf{salt water}}.", "salt water", YES, YES),
    ("~ \\boxed{salt\\ water}.", "salt water", YES, YES),
    ("~ $\\text{H}_{2}\\text{O}$.", "H_2O", YES, YES), ("~ \\frac{1}{2} cup.", "1/2 cup", YES, YES),
    ("~ \\frac{1}{2} cup.", "1/3 cup", NO, NO), ("~ 9.8\\,\\mathrm{m/s}.", "9.8 m/s", YES, YES),
    # marks of GSM8K's calculator
    ("~ <<9*2=18>>18.", "18", YES, YES), ("~ 9*2=<<9*2=18>>18.", "18", YES, YES),
    ("~ $<<9*2=18>>18.", "18", YES, YES), ("~ <<9*2=18>>$18.", "18", YES, YES),
    ("~ <<9*2=18>>18 apples.", "18", YES, YES), ("~ <<9*2=18>>19.", "18", NO, NO),
    ("~ <<9*2=18>>19.", "19", YES, YES), ("~ <<9*2=18>>18.", "9", NO, NO),
    ("~ <<9*2=18>>", "18", YES, YES), ("She has 9*2=<<9*2=18>>18 apples.", "18", NO, YES),
    ("~ <<2-5=-3>>-3.", "-3", YES, YES), ("~ <<9*2=18", "18", YES, YES),
    # a text: its first sentence, or an item of a list
    ("~ salt water. It conducts electricity.", "salt water", YES, YES),
    ("~ **salt water.** It conducts.", "salt water", YES, YES),
    ("~ \"Salt water\". It conducts.", "salt water", YES, YES),
    ("~ salt water! It conducts.", "salt water", YES, YES),
    ("~ - salt water.", "salt water", YES, YES),
    ("~ \u2022 salt water", "salt water", YES, YES), ("~ * salt water", "salt water", YES, YES),
    ("~ \u2013 **salt water**", "salt water", YES, YES),
    ("~ salt water.", "- salt water", YES, YES),
    ("~ salt water spray.", "salt water", NO, NO),
    ("~ salt water spray. Yes.", "salt water", NO, NO),
    ("~ salt water, ice.", "salt water", NO, NO), ("~ ice. Or salt water.", "salt water", NO, YES),
    ("~ not salt water. It is ice.", "salt water", NO, NO),
    ("~ water. It is salt.", "salt", NO, YES),
    ("~ -salt water.", "salt water", NO, NO), ("~ - 3\u00b0C.", "3\u00b0C", YES, YES),
    ("~ 9.8 m/s. It falls.", "9.8 m/s", YES, YES),
    ("~ It melts. It boils.", "It melts. It boils.", YES, YES),
    ("~ It melts.", "It melts. It boils.", NO, NO),
    ("~ It melts. It boils.", "It melts.", YES, YES),
    ("~ It melts. It freezes.", "It melts. It boils.", NO, NO),
    ("~ cafe\u0301.", "caf\u00e9", YES, YES), ("~ cafe.", "caf\u00e9", NO, NO),
    # underscores as mark-up
    ("~ __18__.", "18", YES, YES), ("~ _18_.", "18", YES, YES), ("~ ___18___", "18", YES, YES),
    ("__~ 18.__", "18", YES, YES), ("~ _18 apples_.", "18", YES, YES),
    ("~ **_18_**", "18", YES, YES),
    ("~ __salt water__.", "salt water", YES, YES), ("~ x_18.", "18", NO, NO),
    ("~ _x_18.", "18", NO, NO), ("~ snake_case.", "snake_case", YES, YES),
    # a number and a part of one
    ("~ 7 and a half.", "7", NO, NO), ("~ 7 and a half.", "7.5", YES, YES),
    ("~ 7-and-a-half hours.", "7.5", YES, YES), ("~ 7 and one half.", "7", NO, NO),
    ("~ 7 and three quarters.", "7.75", YES, YES), ("~ 7 and two thirds.", "7", NO, NO),
    ("~ 7 and 1/2.", "7.5", YES, YES), ("~ 7 apples and a half.", "7", NO, NO),
    ("She eats 7 and a half.", "7", NO, NO), ("She eats 7 apples and a half.", "7", NO, NO),
    ("~ 7 and a half-eaten apple.", "7", YES, YES), ("~ 7 and a third of a cup.", "7", NO, NO),
    ("~ 7\u00bd.", "7.5", YES, YES), ("~ 7\u00bd.", "7", NO, NO), ("~ \u00bc.", "0.25", YES, YES),
    ("~ 1\u20442.", "0.5", YES, YES), ("~ 18 apples in 3 and a half days.", "18", YES, YES),
    ("~ 18 apples in 3 days and a half.", "18", YES, YES), ("~ $4 million.", "4", YES, YES),
]


@pytest.mark.parametrize("reply, gold, strictly, flexibly", REPLIES)
def test_replies(reply, gold, strictly, flexibly):
    reply = reply.replace("~", TEMPLATE)
    assert (strict(reply, gold), flexible(reply, gold)) == (strictly, flexibly)
    assert same_answer(answer_in(reply), gold) is strictly


WATERS, METALS = ("salt water", "water", "ice"), ("iron", "copper")
SPEEDS = ("40", "40 m/s", "40 m/s north", "0.5 m/s", "5 m/s", "-5 m/s")
CHOICES = [
    ("~ salt water.", "water", WATERS, NO, NO), ("~ salt water.", "salt water", WATERS, YES, YES),
    ("It is water, not ice.", "water", WATERS, NO, YES),
    ("It is water, not ice.", "ice", WATERS, NO, NO),
    ("Ice melts, so water.", "water", WATERS, NO, YES),
    ("Ice melts, so water.", "ice", WATERS, NO, NO),
    ("It swims underwater.", "water", WATERS, NO, NO),
    ("It is a salt-water fish.", "water", WATERS, NO, NO),
    ("Not the salt water.", "water", WATERS, NO, NO), ("", "water", WATERS, NO, NO),
    ("~ not iron but copper.", "iron", METALS, NO, NO),
    ("~ not iron but copper.", "copper", METALS, NO, YES),
    ("~ copper, not iron.", "copper", METALS, NO, YES),
    ("~ copper, not an iron.", "iron", METALS, NO, NO),
    ("~ iron\nand\nCOPPER", "copper", METALS, NO, YES), ("~ iron", "", METALS, NO, NO),
    ("~ gold", "gold", METALS, YES, YES), ("gold", "gold", METALS, NO, NO),
    ("iron", "iron", ("", ".", "iron"), NO, YES), ("a+b", "a+b", ("a+b", "a+", "b"), NO, YES),
    ("It went 40 m/s north!", "40 m/s north", SPEEDS, NO, YES),
    ("It went 40 m/s north!", "40 m/s", SPEEDS, NO, NO), ("So 40 m/s", "40 m/s", SPEEDS, NO, YES),
    ("So 0.5 m/s", "5 m/s", SPEEDS, NO, NO), ("So -5 m/s", "5 m/s", SPEEDS, NO, NO),
    ("So 10.5 m/s", "5 m/s", SPEEDS[4:], NO, NO), ("So \u22125 m/s", "5 m/s", ("5 m/s",), NO, NO),
    ("So 5 m/s^2", "5 m/s", SPEEDS, NO, NO), ("So 3.0", "3", ("1", "3"), NO, YES),
]


@pytest.mark.parametrize("reply, gold, options, strictly, flexibly", CHOICES)
def test_choices(reply, gold, options, strictly, flexibly):
    reply = reply.replace("~", TEMPLATE)
    for given in (options, options[::-1]):
        assert (strict(reply, gold), flexible(reply, gold, given)) == (strictly, flexibly)


@pytest.mark.parametrize("text", [
    "9", "1 ", "1/", "1,234", "9.", "-", "=", "$", "<", "(", ". ", " ", "\t", "x = 1. ", "5 or ",
    "5 and  ", "not ", "water ", "not the ", "\\boxed{", "minus ", TEMPLATE, "'\"", "\ud800",
    "\\frac{", "\\frac{1}{2}", "{", "x^{", "<<", "<<1=", "_", "_1", "1 and a half ",
    "- ", "e\u0301",
])  # fmt: skip
@pytest.mark.slow
def test_a_long_text(text):
    """A quarter of a megabyte of one repeated fragment is graded, without catastrophic
    backtracking."""
    text = text * (1 << 18 >> len(text).bit_length() - 1)
    for gold in ("17", "ice"):
        assert not flexible(f"{text}\n{TEMPLATE} 5{text}6", gold, WATERS)
    assert flexible(f"{text}\n18", "18") and flexible(f"{text}; ice", "ice", WATERS)


# ---- votes

def votes(*answers, gold="18"):
    return {canonical(answer, gold) for answer in answers}


def test_canonical():
    assert len(votes("18", "18.0", "$18.", "2*9=18", "18 apples", "36/2", "\\frac{36}{2}")) == 1
    assert len(votes("18", "-18", "18 or 19", "19", "B12", "", "none")) == 7
    assert votes("", " ", ".", "**", "</s>") == {""}
    assert votes("I don't know.") == votes("i don\u2019t  know") != {""}
    assert len(votes("2 mL", "2 km")) == 1 and len(votes("2 mL", "2 km", gold="2 m")) == 2
    assert votes("Water.", "- water. It is wet.", gold="ice") == {"water"}
    assert len(votes("Water.", "Water. It is wet.", gold="Ice. It is cold.")) == 2


def test_only_the_kind_of_gold_matters_for_votes():
    """A vote for gold's answer is counted as any other vote is."""
    said = ["ice", "ice. Cold.", "- water", "water. Wet.", "18", "18.0", "18 or 19", "2 km", "2 mL"]
    for golds in (("18", "19", "-0.5"), ("ice", "water", "2 km"), ("Ice. Cold.", "A; b")):
        assert len({tuple(canonical(answer, gold) for answer in said) for gold in golds}) == 1


@pytest.mark.parametrize("answers, winner", [
    ([], ""), ([""], ""), (["", " ", "."], ""), (["", "", "7"], "7"), (["7", "8"], "7"),
    (["8", "7", "7.0"], "7"), (["8", "$7", "7", "8."], "8"), (["7", "8", "8", "7"], "7"),
    (["1,200", "9", "1200"], "1,200"), (["none", "none.", "7"], "none"), (["0", "0.0", "7"], "0"),
    (["7", "", "", ""], "7"), (["8", "3+4=7", "7 apples"], "3+4=7"),
])  # fmt: skip
def test_majority(answers, winner):
    assert majority(answers, "18") == winner


def test_majority_of_texts():
    answers = ["2 km", "2 mL", "2 ml. It is little."]
    assert majority(answers, "ice") == "2 mL" and majority(answers, "18") == "2 km"


# ---- any text

@pytest.fixture
def given(tmp_path):
    """A decorator given(*strategies) that runs a function at once, on the same examples every time.
    Nothing is stored between runs."""
    hypothesis = pytest.importorskip("hypothesis")
    hypothesis.configuration.set_hypothesis_home_dir(tmp_path)
    settings = hypothesis.settings(deadline=None, derandomize=True, database=None, max_examples=400)

    def run_on(*strategies):
        def run(check):
            settings(hypothesis.given(*strategies)(check))()
        return run
    return run_on


FRAGMENTS = [*"0123456789", *"0123456789", *".,-+/=$%x()*^eE:;?!'\"`_<>{}\\\n\t ", *"   \u2212",
             "\u2013", "\u00bd", "\u00b2", "\uff11", "\u0660", " or ", " and ", " to ", "not ",
             "minus ", "the ", "kg", " apples", "water", "salt ", "ice", "\\boxed{", "</s>",
             "\\frac{", "\\text{", "{,}", "<<", ">>", "__", " and a half", "- ", ". ", "e\u0301",
             TEMPLATE]


@pytest.fixture
def texts():
    """Arbitrary texts, and texts that resemble answers."""
    st = pytest.importorskip("hypothesis").strategies
    return st.text(max_size=30) | st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)


@pytest.fixture
def numbers():
    """Pairs: an integer, and several spellings of it."""
    st = pytest.importorskip("hypothesis").strategies
    forms = ("{:,}", "{}", "{}.", "${:,}", "$ {}.00", " {} ", "{}.0", "{}%", "\\${}", "{} apples",
             "{}kg", "about {}", "2*9={}", "**{:,}**", "\\boxed{{{}}}", "{}</s>", "{}/1", "+{}",
             "{}. Or 19", "__{}__", "<<1+1={}>>{}", "\\frac{{{}}}{{1}}", "\\text{{{} apples}}")

    def spell(pair):
        n, chosen = pair
        return n, [form.format(n, n) for form in chosen[:6]]
    chosen = st.lists(st.sampled_from(forms), min_size=1)
    return st.tuples(st.integers(0, 10**9), chosen).map(spell)


def test_verdicts_agree_on_any_text(given, texts):
    """Nothing raises; strict implies flexible; votes are equal if and only if answers are."""
    @given(texts, texts, texts)
    def check(text, gold, other):
        for reply in (text, f"{TEMPLATE} {text}", f"{gold}\n{TEMPLATE} {text}"):
            assert strict(reply, gold) == same_answer(answer_in(reply), gold)
            assert flexible(reply, gold) >= strict(reply, gold)
            assert flexible(reply, gold, [gold, other]) >= strict(reply, gold)
        assert "\n" not in answer_in(text)
        number = as_number(gold)
        if number is not None:
            assert same_answer(text, gold) == (number_in(text) == number)
        assert majority([text, gold, gold], gold) in (text, gold, "")


def test_gold_is_right_on_any_text(given, texts):
    @given(texts)
    def check(gold):
        assert same_answer(gold, gold) == (fold(gold) != "")
        if fold(gold) and "\n" not in gold and TEMPLATE not in gold:
            assert strict(f"{TEMPLATE} {gold}", gold) and flexible(f"So, {TEMPLATE} {gold}", gold)


def test_spelling_does_not_matter(given, numbers, texts):
    @given(numbers, texts)
    def check(number, text):
        n, spellings = number
        for said in spellings:
            assert same_answer(said, str(n)) and same_answer(said, f"{n:,}")
            assert not same_answer(said, str(n + 1))
        assert same_answer(f"-{n}", str(-n)) and same_answer(f"\u2212${n:,}", str(-n))
        assert not same_answer(f"not {n}", str(n)) and not same_answer(f"{n} or {n + 1}", str(n))
        for gold in (str(n), "water"):
            right = same_answer(text, gold)
            assert same_answer(f" {text} ", gold) == same_answer(text, f" {gold} ") == right
            if text[-1:] not in "0123456789=":  # only after a digit ("1."), "=" or nothing
                continue
            assert same_answer(f"{text}.", gold) == right


def test_majority_ignores_spelling(given, numbers):
    """It counts numbers in any spelling; one more vote for another answer changes nothing."""
    @given(numbers)
    def check(number):
        n, spellings = number
        votes = [*spellings, *spellings, str(n + 1), ""]
        for seed in range(3):
            random.Random(seed).shuffle(votes)
            assert same_answer(majority(votes, str(n)), str(n))
            winner = majority([str(n + 2), *votes], str(n))
            assert same_answer(winner, str(n)) == (len(spellings) > 0)
        assert majority(spellings, str(n)) == spellings[0]


# ---- real data

def test_gsm8k():
    for row in rows("gsm8k"):
        z, _, gold = row["answer"].rpartition("####")
        reply = f"{z}{TEMPLATE} {gold.strip()}"
        assert as_number(gold) is not None
        for end in (".", "", ".\n\nQuestion: 5?", " apples in 7 days.", "<|im_end|>"):
            assert strict(reply + end, gold) and flexible(reply + end, gold), row
        for end in ("1.", " or 1.5.", "/0.", "*7."):
            assert not strict(reply + end, gold) and not flexible(reply + end, gold), row
        assert not strict(f"{z}{TEMPLATE} not {gold.strip()}.", gold)


def test_arc_challenge():
    for row in rows("arc_challenge"):
        options = dict(zip(row["choices"]["label"], row["choices"]["text"]))
        gold, options = options[row["answerKey"]], [*options.values()]
        assert strict(f"{TEMPLATE} {gold}.", gold) and flexible(f"So {gold}.", gold, options), row
        for other in options:
            if fold(other) != fold(gold):  # three questions have options that differ only in case
                assert not strict(f"{TEMPLATE} {other}.", gold), row
                for reply in (f"{TEMPLATE} {other}.", f"It is {gold}? No: {other}"):
                    assert not flexible(reply, gold, options), (reply, row)


# ---- compared with lm-evaluation-harness

AGREED = [  # (reply, gold): both programs give the same verdicts
    ("Monday 3 + 4 = 7. ~ 7.", "7"), ("Monday 3 + 4 = 7. ~ 8.", "7"), ("3 + 4 = 7.", "7"),
    ("~ 1,200.", "1200"), ("~ 1200.", "1,200"), ("~ 2,125.", "2,125"), ("~ 1,234,567.", "1234567"),
    ("~ -3.", "-3"), ("~ 3.", "-3"), ("~ -3.", "3"), ("~ 18 apples.", "18"), ("~ 18kg.", "18"),
    ("~ 18 apples. She has\nno more.", "18"), ("~ 180.", "18"), ("~ 18.", "180"), ("~ 0.", "0"),
    ("~ unknown.", "18"), ("", "18"), ("I do not know.", "18"), ("~", "18"), ("~\n", "18"),
    ("18", "18"), ("18.", "18"), ("-18", "18"), ("So 18 it is.", "18"), ("So 20 - 2 is 18.", "18"),
    ("the answer is 18.", "18"), ("~ 18%.", "18"), ("~ 18 or so.", "18"), ("~ 18. ~ 18.", "18"),
    ("~ 18<|im_end|>", "18"), ("First 9.\nThen 18.\n~ 18.", "18"), ("~ 18.5.", "18"),
    ("First 18.\nThen 9.\n~ 9.", "18"), ("~\n18.", "18"), ("~ eighteen.", "18"),
    ("~ 19. But 18 is too few, they say.", "18"), ("It is between 17 and 19.", "18"),
    ("~ 17 or 18.5.", "18"), ("~ 18, of course.", "18"), ("~ 18 of them.", "18"), ("~ .", "18"),
    ("~ 18-year-old.", "18"), ("~ -0.", "1"), ("So $18.", "18"), ("**18**", "18"), ("1 8", "18"),
]
DIGIT_FIRST = "its strict filter requires the number directly after the template"
GREEDY = "its strict filter requires one more character, and takes the number's last digit"
SPELLING = "it compares spellings, we compare numbers"
FIRST = "its strict filter reads the first template, ours the last"
UNREAD = "it takes the first or last digits of a hedge or an expression as the answer"
AGAINST = "it ignores negation"
STRICT_FIRST = "with us strict implies flexible, whatever number follows"
DIFFERENCES = {
    ("~: 18.", "18"): DIGIT_FIRST, ("~ (18).", "18"): DIGIT_FIRST, ("~ **18**.", "18"): DIGIT_FIRST,
    ("~ about 18.", "18"): DIGIT_FIRST, ("~ \\boxed{18}.", "18"): DIGIT_FIRST,
    ("~ $18.", "18"): DIGIT_FIRST, ("~ $18 a day.", "18"): DIGIT_FIRST, ("~ 18", "18"): GREEDY,
    ("~ 18", "1"): GREEDY, ("~ 18.0.", "18"): SPELLING, ("~ $18.00.", "18"): SPELLING,
    ("~ \u22123.", "-3"): SPELLING, ("~ 36/2.", "18"): SPELLING, ("~ 1.8e1.", "18"): SPELLING,
    ("~ +18.", "18"): DIGIT_FIRST, ("~ 2*9=18.", "18"): UNREAD, ("~ 2*9=18.", "2"): UNREAD,
    ("~ 18 or 19.", "18"): UNREAD, ("~ 17 or 18.", "18"): UNREAD, ("~ 18-20.", "18"): UNREAD,
    ("~ 3 + 18.", "18"): UNREAD, ("~ 18 + 3.", "18"): UNREAD, ("~ 18:30.", "18"): UNREAD,
    ("~ 1,8.", "18"): "it ignores commas everywhere", ("~ not 18.", "18"): AGAINST,
    ("~ B18.", "18"): "it reads digits inside words", ("The answer isn't 18.", "18"): AGAINST,
    ("~ 5. No, ~ 18.", "18"): FIRST, ("~ 18. ~ 5.", "18"): FIRST,
    ("~ 18 apples in 3 days.", "18"): STRICT_FIRST, ("~ 18 (6 each).", "18"): STRICT_FIRST,
}


@pytest.fixture(scope="module")
def lm_eval_verdicts():
    """A function of (reply, gold): lm-evaluation-harness's verdicts in its task gsm8k_cot, as
    (strict-match, flexible-extract)."""
    yaml, package = pytest.importorskip("yaml"), find_spec("lm_eval")
    if not package:
        pytest.skip("lm_eval is not installed")
    with pytest.MonkeyPatch.context() as patch:  # its metrics import this, only for BLEU
        patch.setitem(sys.modules, "sacrebleu", ModuleType("sacrebleu"))
        from lm_eval.api.instance import Instance
        from lm_eval.api.metrics import exact_match_fn
        from lm_eval.filters import build_filter_ensemble
    task = Path(package.submodule_search_locations[0], "tasks", "gsm8k", "gsm8k-cot.yaml")
    task = yaml.safe_load(task.read_text())
    [metric] = task["metric_list"]
    keys = ("ignore_case", "ignore_punctuation", "regexes_to_ignore")
    options = {key: metric[key] for key in keys}
    filters = {f["name"]: build_filter_ensemble(f["name"], [
        (step.pop("function"), step) for step in f["filter"]]) for f in task["filter_list"]}

    def verdicts(reply, gold):
        instance = Instance("generate_until", {}, (), 0, resps=[reply])
        for each in filters.values():
            each.apply([instance])
        found = (instance.filtered_resps[name] for name in ("strict-match", "flexible-extract"))
        scores = (exact_match_fn(predictions=[f], references=[gold], **options) for f in found)
        return tuple(bool(score["exact_match"]) for score in scores)

    return verdicts


def our_verdicts(reply, gold):
    return strict(reply, gold), flexible(reply, gold)


def test_differences_from_lm_eval(lm_eval_verdicts):
    """The verdicts are the same on AGREED and differ on DIFFERENCES."""
    for reply, gold in AGREED:
        reply = reply.replace("~", TEMPLATE)
        assert our_verdicts(reply, gold) == lm_eval_verdicts(reply, gold), (reply, gold)
    for (reply, gold), reason in DIFFERENCES.items():
        reply = reply.replace("~", TEMPLATE)
        assert our_verdicts(reply, gold) != lm_eval_verdicts(reply, gold), (reply, gold, reason)


def test_lm_eval_on_gsm8k(lm_eval_verdicts):
    """Both accept every gold reply. For gold rationales without an answer, read flexibly, only ours
    accepts where the spelling differs ($16.00); only lm-eval accepts where the last digits of a
    list or an equation happen to be the answer."""
    rationales = Counter()
    for row in rows("gsm8k"):
        z, _, gold = re.sub("<<.*?>>", "", row["answer"]).rpartition("####")
        z, gold = z.strip(), gold.strip()
        reply = f"{z}\n{TEMPLATE} {gold}."
        assert our_verdicts(reply, gold) == lm_eval_verdicts(reply, gold) == (YES, YES), row
        rationales[flexible(z, gold), lm_eval_verdicts(z, gold)[1]] += 1
    assert rationales == {(YES, YES): 8331, (NO, NO): 243, (YES, NO): 209, (NO, YES): 9}
