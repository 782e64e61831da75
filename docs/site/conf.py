"""Sphinx's configuration of `make site`: the pages as they stand, and the API from docstrings."""

from __future__ import annotations

import re
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from admtrt import __version__

if TYPE_CHECKING:
    from docutils.nodes import Element
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

project = "admtrt"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = [
    "*.md",
    "docs/*.md",
    "docs/site/reference.rst",
    "models/fashion-mnist/*.md",
    "tests/data/*.md",
]

nitpicky = True
nitpick_ignore_regex = [
    ("py:class", r"(?!admtrt\.).*")
]  # types of fields; classes of other packages have no page here

myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say types, shapes and units
autodoc_preserve_defaults = True
add_module_names = False
napoleon_google_docstring = True
napoleon_use_ivar = True

html_theme = "furo"
html_title = "admtrt"
html_copy_source = False
html_show_sphinx = False
highlight_language = "text"

_REST = ["docs/site/reference", "models/fashion-mnist/README", "tests/data/README", "CHANGELOG"]
_LINK = re.compile(r"\]\(([\w/-]+)\.md\)")


def _add_contents(_: Sphinx, page: str, source: list[str]) -> None:
    """Make the index of the README the site's table of contents, and keep the README free of directives."""
    if page != root_doc:
        return
    _, index = source[0].split("\n## Read on\n")
    groups = re.split(r"^(?=\w.*:$)", index, flags=re.MULTILINE)[1:]
    trees = []
    for group in groups:
        caption, links = group.split(":\n", 1)
        pages = list(dict.fromkeys(_LINK.findall(links)))
        if group is groups[-1]:
            pages += _REST
        lines = [":hidden:", f":caption: {caption}", "", *pages]
        trees.append("```{toctree}\n" + "\n".join(lines) + "\n```\n")
    source[0] += "\n" + "\n".join(trees)


def _find(app: Sphinx, _: BuildEnvironment, node: pending_xref, contents: Element) -> Element | None:
    """Resolve names given without a module; leave those without a page as text, if they exist."""
    target = node["reftarget"]
    if node.get("refdomain") != "py":
        return None
    if "." in target:
        return contents if _exists(target) else None
    domain = app.env.domains.python_domain
    named = [full for full in domain.objects if full.rpartition(".")[2] == target]
    if not named:
        return None
    place = node.get("refdoc", root_doc)
    return domain.resolve_xref(app.env, place, app.builder, "obj", min(named, key=len), node, contents)


def _exists(name: str) -> bool:
    """True for a module of admtrt, or a name in one."""
    module, _, attribute = name.rpartition(".")
    if not name.startswith("admtrt."):
        return False
    if find_spec(module) is None:  # a method
        module, _, attribute = module.rpartition(".")
    return hasattr(import_module(module), attribute) or find_spec(name) is not None


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("missing-reference", _find)
    app.connect("source-read", _add_contents)
