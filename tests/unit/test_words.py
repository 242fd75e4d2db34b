"""The documents and the sources of the package are written in the words of the project's glossary.

CONTRIBUTING.md has the glossary. In a document prose is read: code blocks, tables made by benchmarks/tables.py and what
programs print are not the page's own words. In a source the string literals, docstrings and comments are read.
"""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = sorted((ROOT / "src" / "veneer").rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "docs").glob("*.ipynb"))

# What is not written → what is.
WORDS: dict[str, str] = {
    r"\bfores(?:ee|een|ees|eeing|aw|ight)\b": "predict, predicted, prediction",
    r"\bforecast(?:s|ed|ing)?\b": "predict, prediction, plan",
    r"\b(?:tells?|told)\b": "print, report, say or show",
    r"\bspoken of\b": "reported, mentioned",
    r"\b(?:let|lets|letting) go\b": "free, freed, release",
    r"\bcomput(?:e|es|ed|ing) (?:[\w-]+ ){0,3}again\b|\bare again computed\b": "recompute, recomputed",
    r"\b(?:is|are|was|were|be|been) there\b(?! (?:a|an|any|no|not)\b)": "available, exists, present",
    r"\bgone through\b": "processed, visited, passed through",
    r"(?:^\W*|[.!?:;] )Of (?!course\b)[a-z0-9]": "the subject first: Activations of 23 of 30 layers …",
    r"\banew\b": "again, from scratch, or re-",
    r"\bwhoever\b|\bwhatever it is\b": "name who or what",
    r"\bthat very\b": "that, the same",
    r"\bbut for\b": "except, apart from",
    r"\bas many as said\b|\bas said\b": "the given number",
    r"\b(?:lie|lies|lay)\b(?! detector)": "is stored, is located, lives, is",
    r"\b(?:stands?|stood) (?:in|there)\b": "is in, was, is listed",
    r"\b(?:is|are|was|were|be) taken for\b": "treated as, read as",
    r"\b[Tt]okeniser\b": "tokenizer; or renderer, which renders examples to tokens",
}  # fmt: skip
# A phrase may be broken over two lines.
_WORDS = [(re.compile(pattern.replace(" ", r"\s+")), instead) for pattern, instead in WORDS.items()]

# A fenced block; a table under a `measured` mark; and an indented block, which is a formula or what a program prints.
_NOT_PROSE = re.compile(
    r"^```.*?^```$|^<!-- measured: \w+ -->\n\n(?:\|[^\n]*\n)+|(?<=\n\n)(?:    (?! *- )[^\n]*\n)+",
    re.MULTILINE | re.DOTALL,
)
_CODE = re.compile(r"`[^`\n]*`|\]\([^)\s]*\)")

Text = tuple[int, str]  # the line that it begins at, and it


def prose(document: str) -> Iterator[Text]:
    """The paragraphs of a page; code and the targets of links are blanked."""
    text = _NOT_PROSE.sub(lambda block: "\n" * block[0].count("\n"), document)
    text = _CODE.sub(lambda code: "`" if code[0].startswith("`") else "]", text)
    line = 1
    for part in re.split(r"(\n(?:\n+|(?=\s*(?:[-*|#]|\d+\.)\s*)))", text):
        if part.strip():
            yield line + part[: len(part) - len(part.lstrip("\n"))].count("\n"), part.strip("\n")
        line += part.count("\n")


def words_of_source(code: str) -> Iterator[Text]:
    """The string literals, docstrings and comments of Python. A run of whole-line comments is one text."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    comments = [
        token for token in tokenize.generate_tokens(io.StringIO(code).readline) if token.type == tokenize.COMMENT
    ]
    run: list[tokenize.TokenInfo] = []
    for token in [*comments, None]:
        follows = run and token and token.start == (run[-1].start[0] + 1, run[-1].start[1])
        if run and not follows:
            yield run[0].start[0], "\n".join(each.string.lstrip("#: ") for each in run)
            run = []
        run += [token] if token else []


def refused(name: str, texts: Iterable[Text]) -> list[str]:
    """What of the texts is not written here, as "file:line: … → …", in the order of the text."""
    matches = [
        (line + text[: match.start()].count("\n"), match.start(), " ".join(match[0].split()), instead)
        for line, text in texts
        for pattern, instead in _WORDS
        for match in pattern.finditer(text)
    ]
    return [f"{name}:{line}: {words!r} → {instead}" for line, _, words, instead in sorted(matches)]


@pytest.mark.unit
@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_a_document_is_in_the_words_of_the_glossary(page):
    problems = refused(str(page.relative_to(ROOT)), prose(page.read_text(encoding="utf-8")))
    assert problems == [], "\n".join(problems)


@pytest.mark.unit
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)
def test_a_notebook_is_in_the_words_of_the_glossary(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    problems = []
    for cell in cells:
        read = prose if cell["cell_type"] == "markdown" else words_of_source
        problems += refused(f"{notebook.name}, cell {cell['id']}", read("".join(cell["source"])))
    assert problems == [], "\n".join(problems)


@pytest.mark.unit
def test_the_sources_are_in_the_words_of_the_glossary():
    problems = [
        problem
        for file in SOURCES
        for problem in refused(str(file.relative_to(ROOT)), words_of_source(file.read_text(encoding="utf-8")))
    ]
    assert problems == [], "\n".join(problems)


@pytest.mark.unit
@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The memory was foreseen.", ["foreseen"]),
        ("It is told\nof nobody.", ["told"]),
        ("Rows fit. Of 23 of 30 layers the activations are computed again.", [". Of 2", "computed again"]),
        ("22 GB are\nthere.", ["are there"]),
        ("is there a way", []),
        ("Of course; one of 23 layers is recomputed, there are two, and it relies on a layer.", []),
        ("`are there` and [this](told.md)", []),
        ("all but four of them, predicted and reported; retold", []),
    ],
)
def test_the_words_are_found_and_no_others(text, found):
    assert [problem.split("'")[1] for problem in refused("x", prose(text))] == found


@pytest.mark.unit
def test_a_problem_has_its_line_in_a_page_and_in_a_source():
    page = "# A page\n\nA line,\nand anew a line.\n\n```text\nanew\n```\n\n- one\n- and spoken\n  of\n\n    anew\n"
    assert refused("p.md", prose(page)) == [
        "p.md:4: 'anew' → again, from scratch, or re-",
        "p.md:11: 'spoken of' → reported, mentioned",
    ]
    code = '"""Fine.\n\nMeasured anew."""\nx = f"is told {1}"  # let go\n# spoken\n# of: anew\nanew = 1\n'
    assert sorted(problem.partition(" →")[0] for problem in refused("s.py", words_of_source(code))) == [
        "s.py:3: 'anew'", "s.py:4: 'let go'", "s.py:4: 'told'", "s.py:5: 'spoken of'", "s.py:6: 'anew'",
    ]  # fmt: skip
