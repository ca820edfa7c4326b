"""`write_report`: report.html, a single file that needs no network and can be passed on."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from saekit.files import whole_file
from saekit.report.page import page
from saekit.run_directory import RunDirectory, read_run

TEMPLATES = Path(__file__).parent / "templates"


def write_report(directory: Path) -> Path:
    """Build `report.html` from the files of the run directory, and return its path.

    The report names missing and damaged files. UsageError if `directory` is not a run directory.
    """
    path = RunDirectory(Path(directory)).report
    write_html(render(directory), path)
    return path


def write_html(html: str, path: Path) -> None:
    """Write a whole page."""
    with whole_file(path) as temporary:
        # Text from data sets may contain half of a surrogate pair, which UTF-8 cannot encode.
        temporary.write_bytes(html.encode("utf-8", errors="replace"))


def render(directory: Path) -> str:
    """The report as a string."""
    content = page(read_run(directory))
    figures = content["loss_figures"] or content["measure_figures"] or any(a.figures for a in content["analyses"])
    return render_template("report.html", content, has_figures=bool(figures))


def render_template(template: str, content: dict[str, Any], *, has_figures: bool) -> str:
    """A page that needs no network: the template with `content`, the style, the scripts and their policy."""
    # Imported here: they are slow to import, and a run needs them only at its end.
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scripts = [get_plotlyjs()] if has_figures else []
    scripts.append(_part("report.js"))
    return environment.get_template(template).render(
        **content,
        style=Markup(_part("report.css")),
        scripts=[Markup(script) for script in scripts],
        policy=content_policy(scripts),
    )


def _part(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8").replace("\r\n", "\n")


def content_policy(scripts: list[str]) -> str:
    """The content security policy of a page with these scripts: it fetches nothing, and nothing else in it can run.

    Plotly compiles drawing code, hence 'unsafe-eval'; the pictures it offers for download are data URLs.
    """
    hashes = (base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return (
        f"default-src 'none'; script-src {allowed} 'unsafe-eval'; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
