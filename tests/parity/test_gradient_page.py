"""The worked examples of docs/gradients.md, run unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "gradients.md"
SECTIONS = dict(section.split("\n", 1) for section in PAGE.read_text().split("\n## ")[1:])
EXAMPLES = {
    title: text.split("```python\n")[1].split("```\n")[0]
    for title, text in SECTIONS.items()
    if "```python" in text
}


def test_the_page_has_its_examples() -> None:
    assert len(EXAMPLES) == 4
    assert all(code.count("assert ") for code in EXAMPLES.values())


@pytest.mark.parametrize("title", EXAMPLES)
def test_an_example_runs(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLES[title], f"{PAGE.name}: {title}", "exec"), {"__name__": "example"})
    assert list(tmp_path.glob("*.onnx"))
