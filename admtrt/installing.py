"""Versions of installed packages, and command lines that install more, for hints.

admtrt is on no package index. Installing it by name could install another author's package.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path


def version_of(package: str) -> str | None:
    """The version of a distribution, without importing it; None if it is not installed."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def pip_install(*arguments: str) -> str:
    """The ``pip install`` command of this environment with these arguments."""
    found = shutil.which("pip")
    own = found is not None and Path(found).parent == Path(sys.executable).parent
    pip = ["pip"] if own else [sys.executable, "-m", "pip"]
    return shlex.join([*pip, "install", *arguments])


def install_extra(extra: str) -> str:
    """The command that installs an extra of admtrt from its origin, or else in a checkout."""
    place, editable = _origin()
    if place is None:
        return f"{pip_install(f'.[{extra}]')}, in a checkout of admtrt"
    return pip_install(*["-e"] * editable, f"{place}[{extra}]")


def _origin() -> tuple[Path | None, bool]:
    """The checkout or wheel that this package comes from, if it is still there, and whether it runs there."""
    from importlib import metadata
    from urllib.parse import unquote, urlsplit

    checkout = Path(__file__).parents[1]
    if (checkout / "pyproject.toml").is_file():
        return checkout, True
    try:
        recorded = json.loads(metadata.distribution("admtrt").read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        return None, False
    url = urlsplit(recorded.get("url", ""))
    place = Path(unquote(url.path))
    return (place, False) if url.scheme == "file" and place.exists() else (None, False)
