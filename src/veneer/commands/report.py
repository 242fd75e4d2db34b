"""What veneer report does, for Python as well."""

from __future__ import annotations

from pathlib import Path

from veneer.errors import DataError, did_you_mean
from veneer.files import write_text
from veneer.reporting.config import ReportOptions
from veneer.reporting.run_page import run_page
from veneer.reporting.study_page import study_page
from veneer.reporting.table import JSON_NAME
from veneer.training.config import CONFIG_NAME

PAGE_NAME = "report.html"


def report(source: str | Path, options: ReportOptions | None = None) -> Path:
    """Write the page of a run, finished or not, or of a study; where it was written.

    Raises DataError when ``source`` is neither, or a study whose files are damaged; ConfigError for a damaged
    config.yaml; OSError where it cannot be written.
    """
    source, options = Path(source), options or ReportOptions()
    if (source / CONFIG_NAME).is_file():
        page = run_page(source)
    elif (source / JSON_NAME).is_file():
        page = study_page(source)
    else:
        near = [str(file.parent) for name in (CONFIG_NAME, JSON_NAME) for file in source.parent.glob(f"*/{name}")]
        raise DataError(
            f"{source} is neither a run nor a study: it has no {CONFIG_NAME} and no {JSON_NAME}."
            f"{did_you_mean(str(source), near)}"
        )
    out = Path(options.output) if options.output else source / PAGE_NAME
    write_text(out, page)
    return out
