"""The one place where something from a network may be unpickled, and only if the configuration says so.

Bluesky's publisher pickles unless it is told otherwise. A pickle is a program: whoever can reach the
port of the proxy could run anything here. So even where pickles are allowed, only plain values and
NumPy arrays are made of them. That is a second fence, not a reason to allow them.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any, Final

_NUMPY_CORES: Final = ("numpy._core", "numpy.core")

#: What a pickled document may name: NumPy's own constructors, and containers that plain values need.
ALLOWED: Final = frozenset(
    {
        ("collections", "OrderedDict"),
        ("builtins", "set"),
        ("builtins", "frozenset"),
        ("builtins", "bytearray"),
        ("builtins", "complex"),
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        *((f"{core}.multiarray", name) for core in _NUMPY_CORES for name in ("_reconstruct", "scalar")),
        *((f"{core}.numeric", "_frombuffer") for core in _NUMPY_CORES),
    }
)


class _PlainUnpickler(pickle.Unpickler):
    """Finds nothing but what is `ALLOWED`."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is neither plain nor an array")
        return super().find_class(module, name)


def is_pickle(payload: memoryview) -> bool:
    """Say whether bytes begin as a pickle of protocol 2 or later does.

    A msgpack map never does: 0x80 is the empty one, and nothing follows that.
    """
    return payload.nbytes > 1 and payload[0] == 0x80 and 2 <= payload[1] <= 5


def load(payload: memoryview) -> Mapping[Any, Any]:
    """Return the document in a pickle. The caller has made sure that pickles are allowed.

    Raises
    ------
    ValueError
        If it is broken, names anything that is not allowed, or holds no document.
    """
    try:
        found = _PlainUnpickler(io.BytesIO(payload)).load()
    except Exception as error:  # a pickle raises what it likes
        said = f"{type(error).__name__}: {error}"[:200].encode("ascii", "backslashreplace").decode()
        raise ValueError(f"pickled document cannot be read: {said}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"pickle holds {type(found).__name__}, expected a document")
    return found
