"""Check for optional packages before any work starts."""

from __future__ import annotations

from importlib.util import find_spec

from admtrt.errors import MissingDependencyError


def require(*packages: str, extra: str, purpose: str) -> None:
    """Check that optional packages are installed.

    Raises:
        MissingDependencyError: naming the first missing one and the extra of admtrt that installs it.
    """
    for package in packages:
        if find_spec(package) is None:
            raise MissingDependencyError(package, extra=extra, purpose=purpose)
