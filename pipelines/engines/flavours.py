"""The two flavours of TensorRT, and which of them is installed.

They share one API: `tensorrt` builds a plan on the GPU that will run it; `tensorrt_rtx` builds one
anywhere, and finishes it for the GPU when it is loaded. Neither is imported before it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from grainwatch.config import did_you_mean


class EngineError(ValueError):
    """An engine that cannot be built or used; the message says which and why."""


@dataclass(frozen=True)
class Flavour:
    """One of them.

    Attributes
    ----------
    name : str
        Of the module, and on the command line.
    extra : str
        What installs it.
    needs_gpu : bool
        Whether building needs the device.
    needs_cuda : (int, int)
        Oldest CUDA version that a driver must serve to run its plans.
    """

    name: str
    extra: str
    needs_gpu: bool
    needs_cuda: tuple[int, int] = (13, 0)

    @property
    def version(self) -> str:
        """What is installed, "" for nothing."""
        try:
            return version(self.name)
        except PackageNotFoundError:
            return ""

    def load(self) -> ModuleType:
        """Import it.

        Raises
        ------
        EngineError
            If it is not installed or does not load.
        """
        try:
            return import_module(self.name)
        except ImportError as error:
            how = f"pip install 'grainwatch[{self.extra}]'"
            raise EngineError(f"{self.name} is not installed or does not load ({error}): {how}") from error


FLAVOURS = (
    Flavour("tensorrt", "tensorrt", needs_gpu=True),
    Flavour("tensorrt_rtx", "tensorrt-rtx", needs_gpu=False),
)
"""The best one first."""


def flavour_of(name: str) -> Flavour:
    """Return a flavour by name; "auto" is the first that is installed.

    Raises
    ------
    EngineError
        If the name is unknown, or nothing is installed.
    """
    if name == "auto":
        for flavour in FLAVOURS:
            if flavour.version:
                return flavour
        raise EngineError(
            "neither tensorrt nor tensorrt_rtx is installed: pip install 'grainwatch[tensorrt-rtx]'"
        )
    for flavour in FLAVOURS:
        if flavour.name == name.replace("-", "_"):
            return flavour
    known = [flavour.name for flavour in FLAVOURS]
    raise EngineError(f"flavour {name!r} is not known{did_you_mean(name, known) or ': ' + ', '.join(known)}")
