"""Check a built site: links to its own files lead somewhere, and nothing is loaded from elsewhere.

``python tools/check_site.py build/site`` prints what is wrong and exits with 1 if anything is. Links that a
reader may follow to another site are no resources and are left alone.
"""

from __future__ import annotations

import functools
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_LOADED = {"script": "src", "img": "src", "link": "href", "source": "src", "iframe": "src", "object": "data"}
"""Attributes whose address a browser loads by itself."""
_IN_CSS = re.compile(r"""(?:url\(\s*|@import\s+)["']?([^"')\s;]+)""")


class Page(HTMLParser):
    """Addresses that a page loads or links to, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.linked: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called by the parser."""
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        self.loaded += [given[name] for name in (_LOADED.get(tag),) if name in given]
        self.loaded += _IN_CSS.findall(given.get("style", ""))
        if tag == "a" and "href" in given:
            self.linked.append(given["href"])


@functools.cache
def page_of(file: Path) -> Page:
    """A file of HTML."""
    return Page(file.read_text(encoding="utf-8"))


def faults(site: Path) -> list[str]:
    """What is wrong with a site, a sentence each."""
    found = []
    for file in sorted(site.rglob("*.html")):
        page = page_of(file)
        for address in [*page.loaded, *page.linked]:
            if address in page.loaded and _is_outside(address):
                found.append(f"{file.relative_to(site)} loads {address}")
            elif not urlsplit(address).scheme and not address.startswith("//") and not _leads(file, address):
                found.append(f"{file.relative_to(site)} has no {address}")
    for file in sorted(site.rglob("*.css")):
        addresses = _IN_CSS.findall(file.read_text(encoding="utf-8"))
        found += [f"{file.relative_to(site)} loads {one}" for one in addresses if _is_outside(one)]
    return found


def _is_outside(address: str) -> bool:
    return address.startswith("//") or urlsplit(address).scheme not in ("", "data")


def _leads(file: Path, address: str) -> bool:
    parts = urlsplit(address)
    target = file if not parts.path else file.parent / unquote(parts.path)
    if not target.exists():
        return False
    anchor = unquote(parts.fragment)
    return not anchor or target.suffix != ".html" or anchor in page_of(target.resolve()).anchors


def main() -> int:
    """Check the site that is named on the command line."""
    site = Path(sys.argv[1])
    found = faults(site)
    pages = len(list(site.rglob("*.html")))
    if not pages:
        found.append(f"{site} has no page")
    for fault in found:
        print(fault)
    print(f"{pages} pages, {len(found)} faults")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
