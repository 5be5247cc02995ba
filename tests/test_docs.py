"""The snippets of the pages on uses run as they stand."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("sentiment", "recommendation", "shakespeare", "translation")


@pytest.mark.parametrize("page", PAGES)
def test_snippets_run(page):
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / f"{page}.md").read_text(), re.S | re.M)
    assert blocks
    names = {}
    for block in blocks:
        exec(compile(block, f"{page}.md", "exec"), names)
