"""README and docs say what is so: links, names, commands and tables."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastseg.models import list_models, model_info

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


@each_page
def test_names(page):
    """``fastseg.a.b`` in a text is a module or an attribute."""
    for name in set(re.findall(r"\bfastseg(?:\.[A-Za-z_]\w*)+", page.read_text())):
        at, *rest = name.split(".")
        found = importlib.import_module(at)
        for part in rest:
            at += f".{part}"
            found = getattr(found, part, None) or importlib.import_module(at)


@each_page
def test_commands(page):
    """``$ fastseg NAME --option`` in a text is a command that has this option."""
    testing = pytest.importorskip("typer.testing")
    from fastseg.cli.app import app

    for line in re.findall(r"^\$ fastseg (.*)$", page.read_text(), re.MULTILINE):
        words = shlex.split(line, comments=True)
        command = words[:2] if words[0] == "crf" and words[1] == "tune" else words[:1]
        command += ["refine"] if command == ["crf"] else []
        about = testing.CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200"})
        for word in words:
            if word.startswith("-"):
                assert re.search(rf"{word.partition('=')[0]}\b", about.output), line


@each_page
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
