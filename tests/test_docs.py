"""The pages about the networks."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastseg.models import list_models, model_info

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda p: p.name)
def test_links(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_every_paper_has_a_page():
    pages = [page.read_text() for page in (ROOT / "docs" / "models").glob("*.md")]
    for url in {model_info(name).paper.url for name in list_models() if "u2net" not in name}:
        assert any(url in text for text in pages), url


@pytest.mark.slow
def test_tables_and_pictures_are_those_of_the_code():
    script = ROOT / "tools" / "draw_models.py"
    run = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
