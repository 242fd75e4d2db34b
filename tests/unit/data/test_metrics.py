"""Measures of answers: by name against the libraries they come from, and functions of one's own."""

from __future__ import annotations

import sys

import pytest

from veneer.data.formats import Example
from veneer.data.metrics import NAMES, check_metric, check_metrics, metric_of, row_of
from veneer.errors import ConfigError, DataError

pytestmark = pytest.mark.unit

ROWS = [
    Example("d:1", prompt="Name a city:", answer=" Paris in France"),
    Example("d:2", prompt="And another:", answer=" the city of Rome is old"),
]
SAID = ["Paris", "the old city of Rome"]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A function that writes a module of the working folder and gives its name."""
    monkeypatch.chdir(tmp_path)
    made = []

    def write(text):
        name = f"own_metric_{len(made)}_{abs(hash(text)) % 10**6}"
        (tmp_path / f"{name}.py").write_text(text)
        made.append(name)
        return name

    yield write
    for name in made:
        sys.modules.pop(name, None)


def test_exact_is_letter_by_letter():
    exact = metric_of("exact")
    assert exact.of(["Paris in France ", "the old city"], ROWS) == 0.5
    several = [Example("d:1", prompt="t", answer="a, b", labels=("b", "a"))]
    assert exact.of([("a", "b")], several) == 1.0


def test_rouge_and_bleu_are_those_of_their_libraries():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"])
    answers = [row.last_answer() for row in ROWS]
    for name, theirs in (("rouge-1", "rouge1"), ("rouge-2", "rouge2"), ("rouge-l", "rougeL")):
        wanted = [scorer.score(answer, said)[theirs].fmeasure for answer, said in zip(answers, SAID, strict=True)]
        assert metric_of(name).of(SAID, ROWS) == pytest.approx(sum(wanted) / 2)
    sacrebleu = pytest.importorskip("sacrebleu")
    assert metric_of("bleu").of(SAID, ROWS) == sacrebleu.corpus_bleu(SAID, [answers]).score
    assert metric_of("bleu").of(answers, ROWS) == pytest.approx(100)
    with pytest.raises(DataError, match=r"^rouge-l counts words of the letters a to z .* the first is at d:1"):
        metric_of("rouge-l").of(["ラーメン"], [Example("d:1", prompt="t", answer="寿司")])


def test_rouge_by_hand():
    """Lin (2004): of 3 and 1 words one is common, so recall 1/3, precision 1, F1 1/2."""
    pytest.importorskip("rouge_score")
    assert metric_of("rouge-1").of(SAID[:1], ROWS[:1]) == pytest.approx(0.5)
    assert metric_of("rouge-2").of(SAID[:1], ROWS[:1]) == 0


@pytest.mark.parametrize(("name", "package"), [("rouge-l", "rouge-score"), ("bleu", "sacrebleu")])
def test_a_library_that_is_missing_is_named(name, package, monkeypatch):
    for module in ("rouge_score", "rouge_score.rouge_scorer", "sacrebleu"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"^The metric {name} needs the package {package}, .*veneer\[metrics\]"):
        metric_of(name)


def test_a_function_of_ones_own(own):
    module = own(
        "def longer(prediction, row):\n    return len(prediction) - len(row['answer'])\n"
        "longer.higher_is_better = False\n"
        "def started(prediction, row):\n    return row['prompt'].startswith('Name')\n"
    )
    longer = metric_of(f"{module}:longer")
    assert longer.of(SAID, ROWS) == ((5 - 15) + (20 - 23)) / 2
    assert not longer.higher_is_better
    started = metric_of(f"{module}:started")
    assert (started.of(SAID, ROWS), started.higher_is_better) == (0.5, True)
    assert str(sys.path[0]) != str(sys.modules[module].__file__)


def test_what_a_function_is_given():
    talk = (
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Farewell"},
    )  # fmt: skip
    row = row_of(Example("d:1", messages=talk))
    assert (row["answer"], row["messages"]) == ("Farewell", list(talk[:3]))
    assert row_of(Example("d:1", prompt="t\n", answer="a, b", labels=("b", "a"))) == {
        "where": "d:1", "prompt": "t", "answer": "a, b", "messages": None, "labels": ["b", "a"]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ("raise KeyError('score')", r"failed at d:2: KeyError: .*score"),
        ("return None", r"gave 'None' at d:2, which is no finite number"),
        ("return float('nan')", r"gave 'nan' at d:2"),
    ],
)
def test_what_a_function_raises_names_the_row(own, body, match):
    module = own(f"def m(prediction, row):\n    if row['where'] == 'd:2':\n        {body}\n    return 1\n")
    with pytest.raises(DataError, match=rf"^The metric {module}:m {match}"):
        metric_of(f"{module}:m").of(SAID, ROWS)


def test_what_cannot_be_imported_is_said_in_one_sentence(own):
    with pytest.raises(ConfigError, match=r"^The metric nowhere.at:all cannot be imported: there is no such module\."):
        metric_of("nowhere.at:all")
    module = own("import nothing_of_that_name\n")
    with pytest.raises(ConfigError, match=r"cannot be imported: ModuleNotFoundError: .*nothing_of_that_name"):
        metric_of(f"{module}:m")
    module = own("def score(prediction, row):\n    return 1\nvalue = 3\n")
    with pytest.raises(ConfigError, match=rf"^{module} has no function 'scor' for a metric\. .*'score'"):
        metric_of(f"{module}:scor")
    with pytest.raises(ConfigError, match="has no function 'value' for a metric"):
        metric_of(f"{module}:value")


def test_names_are_checked():
    assert [check_metric(name) for name in (*NAMES, "a.b:c")] == [*NAMES, "a.b:c"]
    for wrong in ("rouge", "a.b", "a:b:c", "a b:c", ":c", "os:", ""):
        with pytest.raises(ValueError, match="is no metric"):
            check_metric(wrong)
    with pytest.raises(ValueError, match=r"'rouge-' is no metric.*'rouge-"):
        check_metric("rouge-")
    with pytest.raises(ValueError, match="'exact' is named twice"):
        check_metrics(["exact", "exact"])
