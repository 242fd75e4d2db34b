"""mkdocs hooks: the documents of the repository's root are pages of the site, too, and links to them lead there.

A page of docs/ links to `../CONTRIBUTING.md`, and a document of the root to `docs/data.md`, as a forge needs it. In the
site the documents of the root are in `project/`, so the links are rewritten while it is built.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
FOLDER = "project"
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")


def on_files(files: Any, config: Any) -> Any:
    for name in DOCUMENTS:
        files.append(File.generated(config, f"{FOLDER}/{name}", content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri.startswith(f"{FOLDER}/"):
        return re.sub(r"\]\(docs/", "](../", markdown)
    return re.sub(rf"\]\(\.\./({'|'.join(map(re.escape, DOCUMENTS))})", rf"]({FOLDER}/\1", markdown)
