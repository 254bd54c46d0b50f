"""Subscribe to what a grainwatch daemon finds, and read its messages.

>>> from grainwatch import ResultStream          # doctest: +SKIP
>>> for result in ResultStream("tcp://beamline:31100"):
...     print(result.key.frame, [c.material for c in result.crystals])
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from grainwatch.stream import ResultStream

__all__ = ["ResultStream", "__version__"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `grainwatch --help` and the config model do not pay for sockets.
    if name == "ResultStream":
        from grainwatch.stream import ResultStream

        return ResultStream
    raise AttributeError(f"module 'grainwatch' has no attribute {name!r}")
