"""The kernels that TensorRT-RTX compiles for this GPU, cached in a file beside the plan."""

from __future__ import annotations

import contextlib
import hashlib
from typing import TYPE_CHECKING, Any

from admtrt.errors import OutputError
from admtrt.files import atomic_file
from admtrt.reading import read_small

if TYPE_CHECKING:
    from admtrt.runtime.engines.plans import PlanStore

_DIGEST = 32  # bytes of SHA-256, which precede the library's data
_LARGEST = 2**30  # bytes


class KernelCache:
    """The runtime cache of one plan.

    A file that is damaged, came with a bundle, or is refused by the library is ignored: the kernels are
    compiled again.

    Args:
        store: the plan's store.
        name: name of the file, which need not exist.
    """

    def __init__(self, store: PlanStore, name: str) -> None:
        self._store = store
        self._path = store.root / name
        self._cache: Any = None
        self._kept = b""

    def attach(self, config: Any) -> None:
        """Make contexts with a runtime configuration use the cache."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            self._kept = self._read()
            if self._kept and not self._cache.deserialize(self._kept):
                self._kept = b""
        config.set_runtime_cache(self._cache)

    def keep(self) -> None:
        """Write newly compiled kernels. A folder that cannot be written is no error."""
        if self._cache is None:
            return
        compiled = bytes(self._cache.serialize())
        if compiled == self._kept:
            return
        digest = hashlib.sha256(compiled)
        with contextlib.suppress(OutputError), atomic_file(self._path) as temporary:
            temporary.write_bytes(digest.digest() + compiled)
        self._store.remember(digest.hexdigest(), self._path.name)
        self._kept = compiled

    def _read(self) -> bytes:
        try:
            data = read_small(self._path, _LARGEST)
        except OSError:
            return b""
        compiled = data[_DIGEST:]
        digest = hashlib.sha256(compiled)
        whole = digest.digest() == data[:_DIGEST]
        return compiled if whole and self._store.trusts(digest.hexdigest()) else b""
