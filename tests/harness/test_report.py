"""Proves that --report and --show present the results correctly and safely.

Text from models and data is untrusted: none may become markup, script or a terminal command.
"""

import json
import re
from base64 import b64encode
from collections import Counter
from hashlib import sha256
from html.parser import HTMLParser

import pytest
from conftest import TINY, TOY

import eval as grading
from harness import errors, report

RIGHT = dict(base=[0, 1, 1, 0, 0, 1], sft=[1, 1, 0, 0, 0, 1], run=[1, 0, 1, 0, 1, 1])
GROUPS = ["fixed", "broken", "both right", "both wrong", "fixed", "both right"]
NASTY = {
    "end of script": "</script><script>alert(1)</script>",
    "end in capitals": "</SCRIPT ><h1>big</h1>",
    "end, cut short": "</script",
    "comment": "<!-- <script> --> <!--",
    "image": "<img onerror=alert(1) src=x>",
    "drawing": "<svg/onload=alert(1)>",
    "attribute": "\" onmouseover=\"alert(1)\" x='",
    "style": "</style><style>body{display:none}</style>",
    "policy": "<meta http-equiv=refresh content='0;url=javascript:alert(1)'>",
    "base": "<base href=//example.org><link rel=stylesheet>",
    "line separators": "a\u2028b\u2029c",
    "entities": "&lt;b&gt; &#60;i&#62; &amp;amp; &",
    "section": "]]><![CDATA[ <?xml ?>",
    "placeholder": "{{data}} {{script}} {{style}} \\1 \\g<0>",
    "backslashes": "\\u003c \\\\ \\\" \\n",
    "controls": "\x00\x1b[2J\r\x08\x7f\x9b",
    "half a letter": "\ud800 and \udfff",
    "not Latin": "\u202eright to left\u202c \u4e2d\u6587 \U0001f600",
}


def record(right: bool, text="so 2. The answer is 2.", question="1 + 1?", gold="2", r=-0.25):
    """One question of a results file, with two samples."""
    sample = dict(text=text, said="2", right=bool(right), logp_z=-3.0, logp0_z=-4.0, logp_y=-0.125,
                  answers=2, reward=r, z_len=3, finished=True, eos=False, z="so 2.", actions=6,
                  reaches=True, template=-0.5, answer=-0.1, end=-0.025)
    return dict(question=question, gold=gold, options=[], text=text, said="2", right=bool(right),
                samples=[sample, sample | dict(right=False)],
                direct=dict(template=-1.0, answer=-2.0, end=-0.5))


def example_rows(**changes) -> dict[str, list[dict]]:
    return {name: [record(right, **changes) for right in own] for name, own in RIGHT.items()}


def html(rows: dict[str, list[dict]], command: str = "eval.py") -> str:
    return report.page(report.content(command, rows, grading.results(rows), 2))


class Skeleton(HTMLParser):
    """Every tag of a page with the names of its attributes, and the text of each script."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.scripts, self.policy = [], [], None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, *(name for name, _ in attributes)))
        if ("http-equiv", "Content-Security-Policy") in attributes:
            self.policy = dict(attributes)["content"]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, text):
        if self.cdata_elem == "script":
            self.scripts[-1] += text


# ------------------------------------------------------------------------------ the page
@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_text_stays_text(text):
    rows = example_rows(text=text, question=text, gold=text)
    rows[text] = rows.pop("run")
    page, template = html(rows, command=text), Skeleton(report.PAGE.read_text())
    found = Skeleton(page)
    assert found.tags == template.tags
    assert page.isascii() and not re.search("[<>&]", found.scripts[0])
    embedded = json.loads(found.scripts[0])
    assert embedded["command"] == text and embedded["names"] == ["base", "sft", text]
    assert len(embedded["questions"]) == 6
    for q in embedded["questions"]:
        assert q["question"] == q["gold"] == text
        assert all(row["text"] == text == row["samples"][1][0] for row in q["rows"])


@pytest.mark.filterwarnings("ignore:invalid value")  # the spread of -inf
def test_data_in_the_page():
    """The page holds all replies and tables. Numbers are text, also -inf, which JSON lacks."""
    rows = example_rows(r=float("-inf"))
    embedded = json.loads(Skeleton(html(rows)).scripts[0])
    text = "so 2. The answer is 2."
    base, _, run = embedded["questions"][1]["rows"]
    assert run == dict(text=text, right=False, direct="-2.50", samples=[
        [text, False, "-inf", "-0.12", 3], [text, False, "-inf", "-0.12", 3]])
    assert base["samples"][0][1] is True
    for heads, *lines in embedded["tables"]:
        assert [line[0] for line in lines] == [[name, ""] for name in embedded["names"]]
        assert {len(line) for line in lines} == {len(heads)}
    assert embedded["names"] == ["base", "sft", "run"]
    heads, base, sft, run = embedded["tables"][0]
    assert [name for name, _ in heads] == ["", "greedy", "loose", "T = 1", "maj@2", "pass@2"]
    assert base[1][0] == "0.500" and re.fullmatch(r"0\.\d{3} to \d\.\d{3}", base[1][1])
    assert run[1][0] == "0.667" and embedded["tables"][1][0][1][0] == "log p(y|x)"
    assert [v.split(" - ")[0] for v in embedded["verdicts"]] == ["sft", "run"]


def test_four_groups():
    """A question's group compares the first row with the last; rows in between do not count."""
    assert report.outcomes(example_rows()) == GROUPS
    embedded = json.loads(Skeleton(html(example_rows())).scripts[0])
    assert [q["group"] for q in embedded["questions"]] == GROUPS
    assert embedded["groups"] == ["fixed", "broken", "both right", "both wrong"]
    assert Counter(GROUPS) == {"fixed": 2, "broken": 1, "both right": 2, "both wrong": 1}


def test_the_page_fetches_nothing():
    page = html(example_rows())
    for word in ("http:", "https:", "//example", "src=", "href=", "@import", "url(", "fetch(",
                 "XMLHttp", "innerHTML", "eval("):
        assert word not in page.replace("eval.py", ""), word


def test_the_policy_allows_its_own_script_and_style():
    """By their hashes, as a browser computes them, and nothing else."""
    page = html(example_rows())
    found = Skeleton(page)

    def digest(text):
        return b64encode(sha256(text.encode()).digest()).decode()
    style = page[page.index("<style>") + 7:page.index("</style>")]
    rules = dict(rule.strip().split(" ", 1) for rule in found.policy.split(";"))
    assert rules == {
        "default-src": "'none'", "base-uri": "'none'", "form-action": "'none'",
        "script-src": f"'sha256-{digest(found.scripts[1])}'",
        "style-src": f"'sha256-{digest(style)}'"}
    assert page.index("Content-Security-Policy") < page.index("<style>") < page.index("<script")
    names = [name for _, *attributes in found.tags for name in attributes]
    assert not any(name == "style" or name.startswith("on") for name in names)


def test_template_is_whole():
    """Each placeholder occurs once; language, title, labels and both themes are present."""
    template = report.PAGE.read_text()
    assert sorted(re.findall(r"{{(\w+)}}", template)) == ["data", "script", "style"]
    assert template.isascii() and "{{" not in html(example_rows())
    for part in ('<html lang="en">', "<title>", "prefers-color-scheme: dark", 'aria-label="Search',
                 'role="status"', 'name="viewport"', ":focus-visible", "<noscript>"):
        assert part in template, part


def test_page_size():
    """1320 questions with 8 samples of 100 letters in two rows stay under 5 MB."""
    rows = {name: example_rows(text="x" * 100)[name] * 220 for name in ("base", "run")}
    for r in rows["base"] + rows["run"]:
        r["samples"] = r["samples"][:1] * 8
    assert len(html(rows)) < 5e6


@pytest.mark.parametrize("name", ["missing/page.html", "folder", ".", "a\0b"])
def test_unwritable_page(name, tmp_path, monkeypatch):
    """One sentence says so, and no temporary file is left."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(errors.UserError) as problem:
        report.write_page(name, "text")
    [line] = str(problem.value).splitlines()
    assert line.startswith("--report ") and "name another file" in line
    assert [*(tmp_path / "folder").iterdir()] == []


def test_page_is_replaced(tmp_path):
    """No temporary file is left next to it."""
    path = tmp_path / "page.html"
    report.write_page(str(path), "old")
    report.write_page(str(path), "new")
    assert path.read_text() == "new" and [*tmp_path.iterdir()] == [path]


# ------------------------------------------------------------------------------ the terminal
@pytest.mark.parametrize("text, safe", [
    ("plain 2 + 2 = 4.\nnext", "plain 2 + 2 = 4.\nnext"),
    ("caf\u00e9 \u2212 \u4e2d \U0001f600", "caf\u00e9 \u2212 \u4e2d \U0001f600"),
    ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
    ("\x1b]52;c;cm0gLXJm\x07", "\\x1b]52;c;cm0gLXJm\\x07"),
    ("\x9b2J\x90q\x9c", "\\x9b2J\\x90q\\x9c"),
    ("wrong\rright", "wrong\\rright"),
    ("no\x08\x08yes", "no\\x08\\x08yes"),
    ("a\x00b\x7fc", "a\\x00b\\x7fc"),
    ("\u202e.42 si rewsna\u202c", "\\u202e.42 si rewsna\\u202c"),
    ("\u2066a\u2069\u200f\u061c", "\\u2066a\\u2069\\u200f\\u061c"),
    ("a\u2028b\u2029c\x85d\x0be\x0c", "a\\u2028b\\u2029c\\x85d\\x0be\\x0c"),
    ("zero\u200bwidth\ufeff\xad", "zero\\u200bwidth\\ufeff\\xad"),
    ("tab\there", "tab\\there"),
    ("\ud800\udfff", "\\ud800\\udfff"),
    ("\U000e0041", "\\U000e0041"),
])
def test_printable(text, safe):
    assert report.printable(text) == safe == report.printable(safe)
    safe.encode()


def test_most_informative_first():
    """Fixed and broken alternate, then the other groups do; each question occurs once."""
    found = ["both right", "fixed", "fixed", "fixed", "both wrong", "broken", "both right"]
    assert report.most_informative_first(found) == [1, 5, 2, 3, 0, 4, 6]
    assert report.most_informative_first([]) == []


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize("names", [("base", "run"), ("base", "sft", "run")])
def test_show(width, names):
    """Columns fit the width and hold all of each reply, with control characters escaped."""
    text = "First 12 + 7 = 19. " * 9 + "\x1b[2J" + "x" * 250 + "\n\nThe answer is 19."
    rows = {name: example_rows(text=text)[name] for name in names}
    block = report.show(rows, 1, "broken", width)
    lines = block.split("\n")
    assert max(map(len, lines)) <= width and not re.search(r"[^\n -~]", block)
    assert lines[1:3] == ["question 2: broken", "1 + 1? [2]"]
    heads = [[part.strip() for part in line.split(" | ")] for line in lines]
    assert [*names] in heads
    words = ["right" if RIGHT[name][1] else "wrong" for name in names]
    assert [f"greedy: {word}" for word in words] in heads
    sampled = [h for h in heads if h[0].startswith("sampled:")]
    assert sampled and all(word in cell for word, cell in zip(words, sampled[0]))
    column = (width - 3 * (len(names) - 1)) // len(names)
    for start in range(0, len(names) * (column + 3), column + 3):
        text = "".join(line[start:start + column].strip() for line in lines[4:])
        assert text.count("x" * 250) == 2 and text.count("\\x1b[2J") == 2
        assert text.count("-0.25") == 1 and text.replace(" ", "").endswith("Theansweris19.")


def test_show_picks_rows():
    """It shows base, SFT and the last of several checkpoints."""
    rows = example_rows() | dict(other=example_rows()["run"])
    assert "base | sft | other" in re.sub(" +", " ", report.show(rows, 0, "fixed", 120))


def test_narrow_terminal():
    """A width of eight characters is unusual, but does not fail."""
    assert report.side_by_side(["ab", "cd", "ef"], 8) == "a | c | e\nb | d | f"


def test_from_the_command_line(tmp_path, capsys):
    """The toy's base against itself: nothing is fixed or broken, also on the page."""
    page, (_, data, *_) = tmp_path / "new.html", TINY
    flags = f"--ckpt {TOY} --base {TOY} --task toy --data {data} --k 2 --L 4 --questions 3 --show 2"
    argv = [*flags.split(), "--out", str(tmp_path), "--report", str(page)]
    assert grading.main(argv) == 0
    shown = capsys.readouterr().out
    assert len(re.findall(r"^question \d: both (right|wrong)$", shown, re.MULTILINE)) == 2
    embedded = json.loads(Skeleton(page.read_text()).scripts[0])
    assert embedded["names"] == ["base", "model"] and len(embedded["questions"]) == 3
    assert grading.main([*argv[:-1], str(tmp_path / "no" / "page.html")]) == 1
    assert capsys.readouterr().err.count("eval.py: --report") == 1
