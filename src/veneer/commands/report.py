"""The page of a run or a study, written to a file."""

from __future__ import annotations

from pathlib import Path

from veneer.errors import DataError, did_you_mean
from veneer.files import write_text
from veneer.reporting.config import ReportOptions
from veneer.reporting.run_page import run_page
from veneer.reporting.study_page import study_page
from veneer.reporting.table import JSON_NAME
from veneer.runs.folder import RunFolder


def report(source: str | Path, options: ReportOptions | None = None) -> Path:
    """Write the page of a run, finished or not, or of a study; where it was written.

    Raises DataError when ``source`` is neither, or a study whose files are damaged; ConfigError for a damaged
    config.yaml; OSError where it cannot be written.
    """
    source, options = Path(source), options or ReportOptions()
    if RunFolder(source).exists:
        page = run_page(source)
    elif (source / JSON_NAME).is_file():
        page = study_page(source)
    else:
        near = [
            str(file.parent) for name in (RunFolder.config_file, JSON_NAME) for file in source.parent.glob(f"*/{name}")
        ]
        raise DataError(
            f"{source} is neither a run nor a study: it has no {RunFolder.config_file} and no {JSON_NAME}."
            f"{did_you_mean(str(source), near)}"
        )
    out = Path(options.output) if options.output else RunFolder(source).report_file
    write_text(out, page)
    return out
