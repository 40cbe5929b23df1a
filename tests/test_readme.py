"""The README is current: its table comes from the registry, its local links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sightline import catalog

ROOT = Path(__file__).parents[1]


def test_table_of_systems_is_current() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert catalog.renew(text) == text, "the table of systems is old: run `make readme`"
    assert all(f"`{slug}`" in text for slug in catalog.load_all())


@pytest.mark.parametrize("page", ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))])
def test_local_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [t.split("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in t]
    missing = [t for t in targets if t and not ((ROOT / page).parent / t).exists()]
    assert not missing
