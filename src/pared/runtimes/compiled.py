"""The runtime "compile": torch.compile, with coded weights decoded beforehand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pared.errors import ExportError
from pared.runtimes import eager
from pared.runtimes.quiet import first_line, quiet
from pared.site import plain


def session(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    threads: int | None = None,
    call: Callable[[nn.Module], Any] | None = None,
) -> Callable[[], Any]:
    """Compiled for these arguments; the compilation happens here, not at the first timed call."""
    compiled = torch.compile(plain(model).eval(), dynamic=False)
    once = eager.session(compiled, args, kwargs, threads, call)  # type: ignore[arg-type]
    try:
        with quiet():
            once()
    except Exception as error:
        reason = first_line(error)
        raise ExportError(f"torch.compile cannot compile the model: {reason}; leave the runtime out") from error
    return once
