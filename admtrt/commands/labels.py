"""``--classes`` and ``--num``: the label of each sample."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from admtrt.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from admtrt.bundle import Manifest


def requested_labels(classes: str | None, num: int | None, manifest: Manifest) -> list[int] | None:
    """The label of each sample.

    ``0:10,3:5`` gives those counts; ``0,3`` alternates until there are ``num`` samples (default: one each).
    Without ``classes``, all classes of the bundle alternate. Case and spaces of names do not matter.

    Raises:
        RequestError: for an unknown class, an empty entry, a count out of range or counts that contradict
            ``num``.
    """
    from admtrt.runtime.bulk import MAX_SAMPLES
    from admtrt.runtime.request import named_class

    if num is not None and not 1 <= num <= MAX_SAMPLES:
        raise RequestError(f"{num} samples were asked for; expected 1 to {MAX_SAMPLES}")
    if classes is None:
        if manifest.num_classes is None:
            return None
        return [index % manifest.num_classes for index in range(num or manifest.num_classes)]
    names = manifest.class_names
    parts = list(_entries(classes, names))
    if not all(parts):
        raise RequestError(
            f"there is an empty entry in --classes {classes!r}",
            hint="Write e.g. --classes 0,3,7 or 0:10,3:5.",
        )
    if any(":" in part and named_class(part, names) is None for part in parts):
        counted = [_counted(part, manifest) for part in parts]
        total = sum(count for _, count in counted)
        if total > MAX_SAMPLES:
            raise RequestError(f"--classes gives {total} samples; expected at most {MAX_SAMPLES}")
        if num is not None and num != total:
            raise RequestError(f"--classes gives {total} samples; {num} were asked for")
        return [label for label, count in counted for _ in range(count)]
    turns = [_class_index(part, manifest) for part in parts]
    return [turns[index % len(turns)] for index in range(num or len(turns))]


def _entries(classes: str, names: Sequence[str]) -> Iterator[str]:
    """Split at commas, but keep class names that contain commas whole; the longest match wins."""
    from admtrt.runtime.request import named_class

    def is_known(text: str) -> bool:
        return any(named_class(name, names) is not None for name in (text, text.rpartition(":")[0]))

    parts = classes.split(",")
    longest = 1 + max((name.count(",") for name in names), default=0)
    while parts:
        tries = ((",".join(parts[:end]).strip(), end) for end in range(min(longest, len(parts)), 0, -1))
        whole = ((text, end) for text, end in tries if is_known(text))
        entry, end = next(whole, (parts[0].strip(), 1))
        yield entry
        del parts[:end]


def _counted(part: str, manifest: Manifest) -> tuple[int, int]:
    """Parse ``class:count``."""
    name, count = (text.strip() for text in part.rpartition(":")[::2]) if ":" in part else (part, "")
    if not (count.isascii() and count.isdigit()) or not int(count[:9]) >= 1 or len(count) > 9:
        raise RequestError(
            f"{part!r}: {count!r} is no count of at least 1", hint="Write e.g. --classes 0:10,3:5."
        )
    return _class_index(name, manifest), int(count)


def _class_index(text: str, manifest: Manifest) -> int:
    """The index of a class, given by name or else by number."""
    from admtrt.runtime.request import class_index

    if text not in manifest.class_names:
        with contextlib.suppress(ValueError):
            return int(text)
    return class_index(text, manifest)
