"""The page of a run, of a study, or of several runs side by side, written to a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from veneer.errors import DataError, did_you_mean
from veneer.files import write_text
from veneer.reporting.compared import RunsCompared, beside
from veneer.reporting.compared_page import compared_page
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
        raise DataError(_neither(source, (RunFolder.config_file, JSON_NAME)))
    out = Path(options.output) if options.output else RunFolder(source).report_file
    write_text(out, page)
    return out


def compare_runs(sources: Sequence[str | Path], options: ReportOptions | None = None) -> tuple[Path, RunsCompared]:
    """Write one page of several runs, finished or not: where it was written, and what it compares.

    Raises DataError where one is no run or is given twice; ConfigError for a damaged config.yaml; OSError where the
    page cannot be written.
    """
    paths, options = [Path(source) for source in sources], options or ReportOptions()
    for place, path in enumerate(paths):
        if not RunFolder(path).exists:
            if (path / JSON_NAME).is_file():
                raise DataError(
                    f"{path} is a study, which has a page of its own, veneer report {path}; only runs are compared."
                )
            raise DataError(_neither(path, (RunFolder.config_file,)))
        if any(path.resolve() == other.resolve() for other in paths[:place]):
            raise DataError(f"{path} is given twice; name each run once, or one alone for its own page.")
    compared = RunsCompared.read(paths)
    out = Path(options.output) if options.output else beside(paths)
    write_text(out, compared_page(compared))
    return out, compared


def _neither(source: Path, files: tuple[str, ...]) -> str:
    near = [str(file.parent) for name in files for file in source.parent.glob(f"*/{name}")]
    what = "neither a run nor a study" if len(files) > 1 else "no run"
    lacks = " and ".join(f"no {name}" for name in files)
    return f"{source} is {what}: it has {lacks}.{did_you_mean(str(source), near)}"
