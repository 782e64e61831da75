"""tools/check_site.py: correct sites pass, and it finds every kind of fault."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "check_site.py"

GOOD = """<html><head><link rel="stylesheet" href="style.css"></head><body id="top">
<a href="other.html#part">a</a><a href="#top">b</a><a href="https://x.org/">c</a><a href="mailto:x@y">d</a>
<img src="a%20b.png"><img src="data:image/png;base64,AA"></body></html>"""


def check(site: Path) -> tuple[int, str]:
    """Exit code and output."""
    done = subprocess.run([sys.executable, TOOL, site], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.returncode, done.stdout


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "index.html").write_text(GOOD)
    (tmp_path / "other.html").write_text('<p id="part">')
    (tmp_path / "style.css").write_text("p { background: url(a.png) }")
    (tmp_path / "a b.png").touch()
    return tmp_path


def test_a_good_site(site: Path) -> None:
    assert check(site) == (0, "2 pages, 0 faults\n")


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ('<a href="nowhere.html">', "index.html has no nowhere.html"),
        ('<a href="other.html#no">', "index.html has no other.html#no"),
        ('<a href="#no">', "index.html has no #no"),
        ('<img src="no.png">', "index.html has no no.png"),
        ('<script src="https://x.org/x.js">', "index.html loads https://x.org/x.js"),
        ('<link href="//x.org/f.css">', "index.html loads //x.org/f.css"),
        ('<p style="background: url(http://x.org/a.png)">', "index.html loads http://x.org/a.png"),
    ],
)
def test_faults_of_a_page(site: Path, added: str, said: str) -> None:
    (site / "index.html").write_text(GOOD.replace("</body>", f"{added}</body>"))
    assert check(site) == (1, f"{said}\n2 pages, 1 faults\n")


@pytest.mark.parametrize("css", ["@import 'https://x.org/a.css';", "a { src: url('https://x.org/a.css') }"])
def test_faults_of_a_style_sheet(site: Path, css: str) -> None:
    (site / "style.css").write_text(css)
    assert check(site) == (1, "style.css loads https://x.org/a.css\n2 pages, 1 faults\n")


def test_no_site(tmp_path: Path) -> None:
    assert check(tmp_path) == (1, f"{tmp_path} has no page\n0 pages, 1 faults\n")
