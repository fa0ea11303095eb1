"""The user's own code: `FILE.py:FUNCTION`. The file is imported, the function called without arguments."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

from torch import nn

from pared.errors import InputError, ParedError
from pared.sources.contents import Data, Facts, facts_of
from pared.task import Task


def model(spec: str) -> tuple[nn.Module, Facts]:
    """What the function returns: a module, or a module and a `pared.Task`."""
    made = _called(spec)
    task = None
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], Task):
        made, task = made
    if not isinstance(made, nn.Module):
        raise InputError(f"{spec} must return a torch.nn.Module, or a module and a pared.Task, got {_described(made)}")
    known = facts_of(made, spec)
    if task is None:
        return made, known
    args, kwargs = task.example()
    return made, Facts(spec, known.image, known.tokenizer, args, kwargs, task)


def data(spec: str, facts: Facts, batch_size: int | None, seed: int) -> Data:
    """What the function returns: a `pared.Task`, or loaders (train, val) or (train, val, test), or a dict of them.
    Batch size and order are the function's own."""
    made = _called(spec)
    if isinstance(made, Task):
        return Data(made)
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], Task):
        return Data(made[1])
    if isinstance(made, tuple | list) and len(made) in (2, 3):
        made = dict(zip(("train", "val", "test"), made, strict=False))
    if isinstance(made, dict) and {"train", "val"} <= made.keys() <= {"train", "val", "test", "calibration"}:
        return Data(Task(**made))
    raise InputError(f"{spec} must return a pared.Task, or loaders (train, val[, test]), got {_described(made)}")


def _called(spec: str) -> Any:
    file, _, name = spec.rpartition(":")
    module = _imported(Path(file).resolve(), file)
    function = getattr(module, name, None)
    if not callable(function):
        functions = [known for known, value in vars(module).items() if callable(value) and not known.startswith("_")]
        near = difflib.get_close_matches(name, functions, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(functions) or 'none'}"
        raise InputError(f"{file} must have a function {name!r}, found none; {hint}")
    try:
        return function()
    except ParedError:
        raise
    except Exception as error:
        raise InputError(f"{spec} must run when called without arguments, {_reason(error)}") from error


@functools.cache
def _imported(path: Path, shown: str) -> Any:
    if not path.is_file():
        raise InputError(f"FILE.py:FUNCTION must name a file, found no {shown!r}; check the path")
    # Under its own name where that is free, so that what it defines shows up as the user knows it.
    name = path.stem if path.stem.isidentifier() and path.stem not in sys.modules else f"pared_source_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{shown} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.append(folder)  # for files beside it, also when they are imported later
    try:
        spec.loader.exec_module(module)
    except ParedError:
        del sys.modules[name]
        raise
    except Exception as error:
        del sys.modules[name]
        raise InputError(f"{shown} must import without errors, {_reason(error)}") from error
    return module


def _reason(error: Exception) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" in line {trace.tb_lineno} of {Path(trace.tb_frame.f_code.co_filename).name}" if trace else ""
    text = str(error).strip().splitlines()
    return f"it raised {type(error).__name__}{where}: {text[0] if text else 'without a message'}"


def _described(made: Any) -> str:
    if isinstance(made, tuple | list):
        return f"a {type(made).__name__} of {', '.join(type(part).__name__ for part in made) or 'nothing'}"
    return type(made).__name__
