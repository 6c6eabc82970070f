"""The generated pages of the docs are current."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def test_the_page_of_options_is_current() -> None:
    assert (DOCS / "options.md").read_text() == runpy.run_path(str(DOCS / "generate.py"))["page"]()
