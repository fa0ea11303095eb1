"""Compiling the inner loops, on first use: numba takes 0.4 s to import, which small tensors must not pay.

Compiled code is kept by numba beside the source (`__pycache__`), or where that cannot be written in the user's cache
folder (NUMBA_CACHE_DIR overrides it); the first use of a loop on a machine costs about half a second, later ones
milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

SMALL = 4096  # symbols; up to here plain Python is quicker than importing numba


@cache
def compiled(function: Callable) -> Callable:
    """function in machine code; it must check its own bounds, since numba does not."""
    import numba

    return numba.njit(function, cache=True)
