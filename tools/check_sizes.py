"""Refuse Python files of more than 500 lines: part of ``make check``."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("admtrt", "tests", "tools")
MOST_LINES = 500


def main() -> None:
    """Exit with the files that are too long, each with its lines."""
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    lines = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    long = [f"{path}: {count} lines" for path, count in lines.items() if count > MOST_LINES]
    if long:
        raise SystemExit("\n".join([*long, f"No Python file has more than {MOST_LINES}: split it by topic."]))


if __name__ == "__main__":
    main()
