"""A run's folder: everything in it is written whole or not at all, and the same command goes on from it."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pared.errors import InputError

MARK = "run.json"


class RunFolder:
    """`out/`: run.json (what the run is), log.txt, state/ (what is done so far), and at the end the results.

    Args:
        path: the folder; None keeps nothing.
        identity: everything that the result depends on, as JSON values. A folder of another run is refused.
    """

    def __init__(self, path: str | Path | None, identity: dict[str, Any]) -> None:
        self.path = Path(path) if path is not None else None
        self.resumed = False
        if self.path is None:
            return
        mark = self.path / MARK
        if mark.exists():
            try:
                found = json.loads(mark.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise InputError(f"{mark} must be a readable JSON file, but it is not: {error}; use another --out") from error
            if not isinstance(found, dict) or found != json.loads(json.dumps(identity)):
                keys = [key for key in identity if not isinstance(found, dict) or found.get(key) != _plain(identity[key])]
                raise InputError(
                    f"{self.path} holds another run (its {', '.join(keys) or 'settings'} differ); use another folder, or delete it"
                )
            self.resumed = True
            self.log("continued")
        else:
            if self.path.exists() and (not self.path.is_dir() or any(not _is_trace(entry) for entry in self.path.iterdir())):
                raise InputError(f"{self.path} must be an empty folder or a run of this command; it is neither")
            try:
                (self.path / "state").mkdir(parents=True, exist_ok=True)
                self.write(MARK, json.dumps(identity, indent=1))
            except OSError as error:
                raise InputError(f"{self.path} must be a folder that can be written: {error.strerror}") from error

    def __bool__(self) -> bool:
        return self.path is not None

    def file(self, name: str) -> Path:
        """The path of a file in the folder; its parent exists."""
        if self.path is None:
            raise ValueError("a run without a folder has no files")
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write(self, name: str, text: str) -> None:
        """Write a text file whole or not at all."""
        if self.path is not None:
            write_whole(self.file(name), lambda path: path.write_text(text, encoding="utf-8"))

    def memo(self, name: str, make: Callable[[], Any]) -> Any:
        """JSON values computed once: read from state/ if an earlier run got there."""
        if self.path is None:
            return make()
        path = self.file(f"state/{name}.json")
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        value = make()
        self.write(f"state/{name}.json", json.dumps(value))
        return _plain(value)

    def log(self, line: str) -> None:
        if self.path is not None:
            with self.file("log.txt").open("a", encoding="utf-8") as log:
                log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def clear_state(self) -> None:
        """The run is over: what was kept for going on is not needed any more."""
        if self.path is not None:
            shutil.rmtree(self.path / "state", ignore_errors=True)


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary neighbour, then put it in the file's place; a failure leaves the old file whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _is_trace(entry: Path) -> bool:
    """Whether a run that was killed in its first moments may have left this."""
    return entry.name == "state" or (entry.name.startswith(".") and entry.name.endswith(".tmp"))


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
