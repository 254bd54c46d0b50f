"""Numba kernels with explicit signatures and an on-disk cache.

Compilation happens when a module is imported for the first time on a machine (``grainwatch
warm`` does it at installation); later starts load machine code from the cache directory,
``$GRAINWATCH_CACHE_DIR`` or ``~/.cache/grainwatch``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


def cache_dir() -> Path:
    """Return the folder of compiled kernels and built engines; it may not exist yet."""
    configured = os.environ.get("GRAINWATCH_CACHE_DIR")
    if configured:
        return Path(configured)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "grainwatch"


# Numba reads this once, when it is imported.
os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_dir() / "numba"))

import numba  # noqa: E402
from numba.core import event  # noqa: E402


def kernel(signature: str | list[str], *, inline: bool = False, fastmath: bool = False) -> Callable[[F], F]:
    """Compile a function ahead of its first call, without the interpreter lock.

    Parameters
    ----------
    signature : str or list of str
        Numba signature(s), for example ``"float64(float64[::1])"``.
    inline : bool
        Let LLVM inline it into its callers.
    fastmath : bool
        Allow re-association; only where NaN and the last bit do not matter.
    """
    decorate = numba.njit(
        signature,
        cache=True,
        nogil=True,
        error_model="numpy",
        fastmath=fastmath,
        forceinline=inline,
    )
    return cast(Callable[[F], F], decorate)


@dataclass(frozen=True)
class _Listener:
    told: Callable[[], None]

    def notify(self, heard: Any) -> None:
        if heard.is_start:
            self.told()


# Numba takes listeners of this class only, which has no types to inherit from.
event.Listener.register(_Listener)


@contextmanager
def compilations(told: Callable[[], None]) -> Iterator[None]:
    """Call `told` before each kernel that is compiled within, not for one that the cache holds."""
    with event.install_listener("numba:compile", _Listener(told)):
        yield
