from __future__ import annotations

import pytest

from . import browser, synthetic


@pytest.fixture(scope="session")
def look():
    """Two runs, 196 visual tokens, two sinks from layer 2 on."""
    return synthetic.make_look()


@pytest.fixture(scope="session")
def tab(tmp_path_factory):
    """A headless browser for the whole session; tests must not rely on what an earlier one left open."""
    if browser.find() is None:
        pytest.skip("no chromium: `apt-get install chromium` to run the browser tests")
    tab = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield tab
    tab.close()


@pytest.fixture
def opened(tab, tmp_path):
    """A function that writes a look's page, opens it at a hash and returns the tab; fails on any console error."""
    from sightline.report import page

    def open_(look, hash: str = "", size: tuple[int, int] = (1280, 900), **options):
        path = tmp_path / "report.html"
        path.write_text(page.render(look, **options), encoding="utf-8")
        tab.problems.clear()
        tab.size(*size)
        tab.open(path, hash)
        return tab

    yield open_
    assert tab.problems == []
