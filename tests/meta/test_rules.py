"""The list that opens a file of gradient rules names every operator in it, and no other."""

from __future__ import annotations

import importlib
import pkgutil
import re

import pytest

from admtrt.export import vjp
from admtrt.export.vjp import RULES
from admtrt.export.vjp.rule import rule

FILES = [name for _, name, _ in pkgutil.iter_modules(vjp.__path__) if name != "rule"]


@pytest.mark.parametrize("name", FILES)
def test_the_docstring_lists_the_operators(name: str) -> None:
    module = importlib.import_module(f"{vjp.__name__}.{name}")
    registered = {operator for operator, rule in RULES.items() if rule.__module__ == module.__name__}
    listed = "\n".join(line for line in (module.__doc__ or "").splitlines() if line.startswith("- "))
    assert registered
    assert registered <= set(re.findall(r"\w+", listed))
    heads = set(re.findall(r"(?:^- |\. |, )(\w+)(?=[:,])", listed, re.MULTILINE))
    assert heads & RULES.keys() <= registered


def test_every_rule_is_in_a_file() -> None:
    assert {rule.__module__.rpartition(".")[2] for rule in RULES.values()} == set(FILES)


def test_an_operator_has_one_rule() -> None:
    before = dict(RULES)
    with pytest.raises(
        ValueError, match=r"^GridSample has a gradient rule, in admtrt\.export\.vjp\.places; "
    ):
        rule("GridSample")(lambda tape, node, incoming: [])
    assert before == RULES
