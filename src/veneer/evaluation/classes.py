"""Each label by itself: precision, recall and F1; and of one label a row, which was chosen for which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class ClassScore:
    """One label's; shares of rows. Precision is 0 where the label was never chosen, recall where no row has it."""

    label: str
    precision: float  # of the rows for which it was chosen, those that have it
    recall: float  # of the rows that have it, those for which it was chosen
    f1: float  # their harmonic mean
    rows: int  # that have it
    chosen: int  # rows for which it was chosen


@dataclass(frozen=True)
class Classes:
    """Every label, and the confusion matrix: right label → chosen label → rows; none where a row may have several."""

    scores: list[ClassScore]
    confusion: list[list[int]]  # (right, chosen), in the order of the scores
    micro_f1: float | None = None  # over all rows and labels together, where a row may have several

    @classmethod
    def of(cls, right: Sequence[str], chosen: Sequence[str], labels: Sequence[str]) -> Classes:
        """What was chosen for rows whose right labels are ``right``; both may be others than ``labels``, too.

        Example:
            >>> [round(score.f1, 2) for score in Classes.of(["a", "a", "b"], ["a", "b", "b"], ["a", "b"]).scores]
            [0.67, 0.67]
        """
        pairs = Counter(zip(right, chosen, strict=True))
        names = list(dict.fromkeys([*labels, *sorted({*right, *chosen} - set(labels))]))
        confusion = [[pairs[row, column] for column in names] for row in names]
        scores = []
        for place, name in enumerate(names):
            hits, rows, times = confusion[place][place], sum(confusion[place]), sum(row[place] for row in confusion)
            precision, recall = hits / times if times else 0.0, hits / rows if rows else 0.0
            f1 = 2 * hits / (rows + times) if rows + times else 0.0
            scores.append(ClassScore(name, precision, recall, f1, rows, times))
        return cls(scores, confusion)

    @classmethod
    def of_several(
        cls, right: Sequence[Collection[str]], chosen: Sequence[Collection[str]], labels: Sequence[str]
    ) -> Classes:
        """The same of rows that may have several of the ``labels``, or none.

        Example:
            >>> found = Classes.of_several([{"a", "b"}, set(), {"b"}], [{"a"}, {"a"}, {"b"}], ["a", "b"])
            >>> [round(score.f1, 2) for score in found.scores], round(found.micro_f1, 2), found.confusion
            ([0.67, 0.67], 0.67, [])
        """
        scores, all_hits, all_given = [], 0, 0
        for name in labels:
            rows, times = sum(name in names for names in right), sum(name in names for names in chosen)
            hits = sum(name in wanted and name in given for wanted, given in zip(right, chosen, strict=True))
            precision, recall = hits / times if times else 0.0, hits / rows if rows else 0.0
            f1 = 2 * hits / (rows + times) if rows + times else 0.0
            scores.append(ClassScore(name, precision, recall, f1, rows, times))
            all_hits, all_given = all_hits + hits, all_given + rows + times
        return cls(scores, [], 2 * all_hits / all_given if all_given else 0.0)

    @property
    def macro_f1(self) -> float:
        """The mean F1 of the labels that a row has, or for which one was chosen."""
        counted = [score.f1 for score in self.scores if score.rows or score.chosen]
        return fmean(counted) if counted else 0.0

    @property
    def largest(self) -> float | None:
        """The share of the label that most rows have: what answering it always would reach. None where a row may have
        several."""
        if self.micro_f1 is not None:
            return None
        counts = [score.rows for score in self.scores]
        return max(counts) / sum(counts)

    def lines(self) -> list[list[str]]:
        """A table's body: label, precision, recall, F1, rows. A label that was never chosen has a mark."""
        return [
            [
                score.label.strip(), f"{100 * score.precision:.1f} %" if score.chosen else "0.0 % (never chosen)",
                f"{100 * score.recall:.1f} %", f"{100 * score.f1:.1f} %", f"{score.rows:,}",
            ]
            for score in self.scores
        ]  # fmt: skip

    def confusion_lines(self) -> list[list[str]]:
        """A table's body: the right label, and how often each label was chosen for it; none where a row may have
        several."""
        return [
            [score.label.strip(), *(f"{count:,}" for count in row)]
            for score, row in zip(self.scores if self.confusion else [], self.confusion, strict=True)
        ]


HEAD = ("label", "precision", "recall", "F1", "rows")
