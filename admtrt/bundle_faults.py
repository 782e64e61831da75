"""Errors for paths that are not bundles, with hints how to get a bundle."""

from __future__ import annotations

import os
import re
import shlex
from typing import TYPE_CHECKING

from admtrt.errors import BundleError

if TYPE_CHECKING:
    from pathlib import Path

MANIFEST = "manifest.json"
_URL = re.compile("(?P<scheme>[a-z][a-z0-9+.-]+):/+(?P<rest>.*)", re.IGNORECASE)  # c:/ is a drive, not a URL
_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.xz", ".tar.bz2", ".tar.zst")
_MAKE = "Make one with: admtrt export UNET --out BUNDLE"


def refuse_url(text: str) -> None:
    """Refuse a URL. ``Path`` has merged its two slashes into one.

    Raises:
        BundleError: naming the URL.
    """
    found = _URL.fullmatch(text)
    if found is not None and not os.path.lexists(text):
        raise BundleError(
            f"{found['scheme']}://{found['rest']} is a URL; a bundle is a directory on this machine",
            hint=f"Download and unpack it, then name the directory that has its {MANIFEST}.",
        )


def no_bundle(path: Path) -> BundleError:
    """Make the error for a path that is not a bundle, with a hint how to get one."""
    if not path.exists():
        return BundleError(f"{path} does not exist", hint=_MAKE)
    if path.is_file() and path.name.lower().endswith(_ARCHIVES):
        file = shlex.quote(str(path))
        unpack = f"python -m zipfile -e {file} ." if path.suffix.lower() == ".zip" else f"tar -xf {file}"
        return BundleError(
            f"{path} is an archive, which is not a bundle; a bundle is a directory with a {MANIFEST}",
            hint=f"Unpack it, e.g. {unpack}, and name the directory.",
        )
    if path.is_file():
        return BundleError(
            f"{path} is not a bundle but a file; a bundle is a directory with a {MANIFEST}",
            hint=f"Name its directory: {path.parent}" if path.name == MANIFEST else _MAKE,
        )
    inner = min(path.glob(f"*/{MANIFEST}"), default=None)
    return BundleError(
        f"{path} is not a bundle: it has no {MANIFEST}",
        hint=_MAKE if inner is None else f"{inner.parent} has one: name that directory.",
    )
