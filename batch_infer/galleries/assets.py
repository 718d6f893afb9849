"""Read the static files of the page, and render its HTML."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

from batch_infer import __version__

STATIC = Path(__file__).parent / "static"
TEMPLATE = Path(__file__).parent / "templates" / "index.html.j2"


def read_static_files() -> dict[str, bytes]:
    """Return the bytes of all static files by their paths."""
    paths = (path for path in sorted(STATIC.rglob("*")) if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(STATIC).as_posix(): path.read_bytes() for path in paths}


def render_page(title: str, generated_at: float, version: int) -> bytes:
    """Return index.html. `generated_at` is in seconds since 1970, and `version` is that of the data files."""
    import jinja2  # slow, and needed once

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    page = environment.from_string(TEMPLATE.read_text("utf-8")).render(
        title=title,
        generator=f"batch-infer {__version__}",
        generated_at=datetime.fromtimestamp(generated_at, timezone.utc).isoformat(timespec="seconds"),
        version=version,
    )
    return page.encode("utf-8", "replace")
