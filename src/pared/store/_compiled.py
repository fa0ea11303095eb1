"""Compiling the inner loops, on first use. Numba takes half a second to import and to get ready even when its own cache
holds the code, so the machine code is kept here and loaded by llvmlite alone, which takes hundredths of a second.

Compiled code is kept beside the source (`__pycache__`), or where that cannot be written in the user's cache folder
(NUMBA_CACHE_DIR overrides it), named after what it depends on: the source file, the types of the arguments, the
processor, the compiler. Where code cannot be kept this way (a loop that calls something outside of itself, other systems
than Linux), numba's own dispatcher runs the loop.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import struct
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

SMALL = 4096  # symbols; up to here plain Python is quicker than loading machine code

_FORMAT = b"pared machine code 1\n"
_RETURNS = {"bool": "?", "int64": "q", "float64": "d"}
_ROOM = 64  # bytes for what a loop returns
_kept: list[Any] = []  # engines: the machine code lives as long as they do


@cache
def compiled(function: Callable) -> Callable:
    """function in machine code; it must check its own bounds, since nothing else does.

    Its arguments are arrays, integers and tuples of arrays; it returns a number, a tuple of numbers, or nothing.
    """
    ready: dict[tuple, Callable] = {}

    def run(*arguments: Any) -> Any:
        kinds = tuple(map(_kind, arguments))
        if kinds not in ready:
            ready[kinds] = _machine_code(function, kinds, arguments)
        return ready[kinds](*arguments)

    return run


def _kind(argument: Any) -> Any:
    if isinstance(argument, tuple):
        return tuple(map(_kind, argument))
    if isinstance(argument, np.ndarray):
        return argument.dtype.str, argument.ndim, argument.flags.c_contiguous, argument.flags.writeable
    return "int"


def _machine_code(function: Callable, kinds: tuple, arguments: Sequence[Any]) -> Callable:
    if sys.platform != "linux":
        return _by_numba(function)
    import llvmlite
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    source = Path(function.__code__.co_filename)
    depends = (function.__name__, kinds, llvmlite.__version__, llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten())
    key = hashlib.sha256(repr(depends).encode() + source.read_bytes()).hexdigest()
    path = _folder(source.parent) / f"{source.stem}.{function.__name__}-{key[:32]}.code"
    content = _read(path)
    if content is None:
        content = _compile(function, arguments)
        if content is None:
            return _by_numba(function)
        _write(path, content)
    return _loaded(content)


def _by_numba(function: Callable) -> Callable:
    import numba

    return numba.njit(function, cache=True)


def _compile(function: Callable, arguments: Sequence[Any]) -> bytes | None:
    """A line of JSON (the loop's name in the object, what it returns) and the object; None if it needs more than itself."""
    import llvmlite.binding as llvm
    import numba

    kinds = tuple(map(numba.typeof, arguments))
    bare: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "_nrt": False}
    loop: Any = numba.njit(**bare)(function)
    loop.compile(kinds)
    returned = loop.overloads[kinds].signature.return_type
    several = isinstance(returned, numba.types.BaseTuple)
    parts = [str(part) for part in (returned if several else () if returned is numba.types.none else (returned,))]
    module = llvm.parse_assembly(loop.inspect_llvm(kinds))
    names = [each.name for each in module.functions if not each.is_declaration]
    outside = [each.name for each in module.functions if each.is_declaration and not each.name.startswith("llvm.")]
    if len(names) != 1 or outside or not all(part in _RETURNS for part in parts):
        return None
    described = {"name": names[0], "returns": "".join(_RETURNS[part] for part in parts), "several": several}
    return json.dumps(described).encode() + b"\n" + _target().emit_object(module)


def _loaded(content: bytes) -> Callable:
    """A function over the machine code. Arrays go as numba's own calls hand them over: owner, parent, sizes, data."""
    import llvmlite.binding as llvm

    head, _, machine_code = content.partition(b"\n")
    described = json.loads(head)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target())
    engine.add_object_file(llvm.ObjectFileRef.from_data(machine_code))
    engine.finalize_object()
    _kept.append(engine)
    address = engine.get_function_address(described["name"])
    layout = struct.Struct(described["returns"])
    prototypes: dict[int, Any] = {}

    def run(*arguments: Any) -> Any:
        flat: list[int] = []
        for argument in arguments:
            _flatten(argument, flat)
        if len(flat) not in prototypes:  # pointers and integers alike are 64 bits wide
            prototypes[len(flat)] = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * len(flat))(address)
        room, failure = ctypes.create_string_buffer(_ROOM), ctypes.c_void_p()
        if prototypes[len(flat)](ctypes.addressof(room), ctypes.addressof(failure), *flat):
            raise ArithmeticError(f"{described['name']} failed")
        values = layout.unpack_from(room.raw)
        return values if described["several"] else values[0] if values else None

    return run


def _flatten(argument: Any, flat: list[int]) -> None:
    if isinstance(argument, tuple):
        for part in argument:
            _flatten(part, flat)
    elif isinstance(argument, np.ndarray):
        flat += (0, 0, argument.size, argument.itemsize, argument.ctypes.data, *argument.shape, *argument.strides)
    else:
        flat.append(int(argument))


@cache
def _target() -> Any:
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features().flatten()
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(cpu=llvm.get_host_cpu_name(), features=features, opt=3, jit=True, codemodel="jitdefault")


def _folder(beside: Path) -> Path:
    named = os.environ.get("NUMBA_CACHE_DIR")
    if named:
        return Path(named)
    if os.access(beside, os.W_OK):
        return beside / "__pycache__"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pared"


def _read(path: Path) -> bytes | None:
    """What was kept, None if there is nothing or it is not whole."""
    try:
        kept = path.read_bytes()
    except OSError:
        return None
    content = kept[len(_FORMAT) + 32 :]
    return content if kept == _FORMAT + hashlib.sha256(content).digest() + content else None


def _write(path: Path, content: bytes) -> None:
    """Keep it for the next process, if the folder allows."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(_FORMAT + hashlib.sha256(content).digest() + content)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
