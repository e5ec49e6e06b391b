"""docs/settings.md and the pages of the settings say what the code says."""

from __future__ import annotations

import pytest

from . import settings_pages

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("page", settings_pages.pages(), ids=lambda page: page.stem)
def test_a_page_says_what_the_code_says(page: settings_pages.Path) -> None:
    wanted = settings_pages.pages()[page]
    assert settings_pages.BLOCK.search(wanted), "it has no generated part"
    assert page.read_text() == wanted, "`python tests/docs/settings_pages.py` writes it anew"


def test_each_setting_has_a_page_and_no_other_is_there() -> None:
    folder = settings_pages.DOCS / "settings"
    assert {page for page in settings_pages.pages() if page.parent == folder} == {*folder.iterdir()}
