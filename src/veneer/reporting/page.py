"""A page from a template: everything that it needs is in it, and its security policy lets a browser fetch nothing else.

Text reaches the page escaped (jinja's autoescape); numbers for the script as JSON in which <, > and & are escaped, so
that no value can end the element that holds it.
"""

from __future__ import annotations

import base64
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from veneer import __version__
from veneer.reporting.charts import Chart, displayed

ASSETS = Path(__file__).parent / "assets"
LIBRARY = ASSETS / "echarts" / "echarts.common.min.js"


def render(template: str, charts: list[Chart], **values: Any) -> str:
    """The HTML of ``template`` (a file of assets/) with ``charts`` and ``values``."""
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    data = [chart.as_json() for chart in charts]
    page = _environment().get_template(template)
    return page.render(charts=charts, chart_data=data, made=made, version=__version__, **values)


def picture(path: Path) -> str:
    """A PNG as the address that holds it."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(ASSETS), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    # What is no number stops here: JSON has none, and the page's script would find nothing at all.
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "ensure_ascii": False}
    environment.filters["shown"] = displayed
    # Ours, and free of what would end the element; a test looks.
    environment.globals["asset"] = lambda name: Markup((ASSETS / name).read_text(encoding="utf-8"))
    environment.globals["library"] = Markup(LIBRARY.read_text(encoding="utf-8"))
    return environment
