"""The interface of `kernels.so`: what its functions take and yield, which the library states by a hash.

Kernels are compiled without checks of their arguments, half of the code of a small one. So a manifest that states other
shapes or types than the kernels were compiled for is refused before they are called, however well it is hashed itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

SYMBOL = "mpq_interface"
"""The function of the library that returns the address of the hash."""
HEX = 64
"""Characters of the hash."""


def digest(
    functions: Sequence[Mapping[str, object]],
    parts: Sequence[Mapping[str, object]],
    prepare: Mapping[str, object] | None,
    tensors: Mapping[str, tuple[str, Sequence[int]]],
) -> str:
    """The SHA-256 of an interface.

    Args:
        functions: the specializations, as in the manifest.
        parts: the parts, as in the manifest.
        prepare: the entry on preparing tensors, as in the manifest.
        tensors: type and shape of each stored tensor that is prepared, by name.
    """
    text = json.dumps([functions, parts, prepare, tensors], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
