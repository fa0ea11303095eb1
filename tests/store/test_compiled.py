"""Machine code gives what the Python loop gives, is kept, and is not trusted when it is not whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pared.store import _compiled


def halved(values, pair, least):
    """Halve in place what is not below `least`; how many, their sum, whether all."""
    n = 0
    total = 0.0
    for i in range(len(values)):
        if values[i] >= least:
            values[i] = values[i] // 2
            total += pair[0][i] * pair[1][i]
            n += 1
    return n, total, n == len(values)


def counted(values, least):
    n = 0
    for value in values:
        n += value >= least
    return n


def unfinished(values):
    print(values)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    _compiled.compiled.cache_clear()
    yield tmp_path
    _compiled.compiled.cache_clear()


def arrays() -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(0)
    return generator.integers(0, 100, 50).astype(np.uint16), (generator.random(50), generator.random(50))


def test_machine_code_gives_what_python_gives_and_fills_the_same_arrays() -> None:
    (values, pair), (twins, _) = arrays(), arrays()
    found = _compiled.compiled(halved)(values, pair, 40)
    expected = halved(twins, pair, 40)
    assert found == pytest.approx(expected) and type(found[0]) is int and type(found[2]) is bool
    assert np.array_equal(values, twins)


def test_views_and_other_types_get_code_of_their_own() -> None:
    values, _ = arrays()
    count = _compiled.compiled(counted)
    assert count(values, 40) == (values >= 40).sum()
    assert count(values[::2], 40) == (values[::2] >= 40).sum()
    assert count(values.astype(np.int64), 40) == (values >= 40).sum()


@pytest.mark.skipif(sys.platform != "linux", reason="code is kept on Linux only")
def test_what_is_kept_is_used_again_and_made_anew_when_it_is_damaged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values, _ = arrays()
    expected = _compiled.compiled(counted)(values, 40)
    (kept,) = folder.glob("*.code")
    whole = kept.read_bytes()

    _compiled.compiled.cache_clear()
    monkeypatch.setattr(_compiled, "_compile", lambda *arguments: pytest.fail("compiled again"))
    assert _compiled.compiled(counted)(values, 40) == expected

    monkeypatch.undo()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(folder))
    for damaged in (whole[:-1], b"", whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]):
        kept.write_bytes(damaged)
        _compiled.compiled.cache_clear()
        assert _compiled.compiled(counted)(values, 40) == expected
        assert kept.read_bytes()[: len(_compiled._FORMAT)] == _compiled._FORMAT and len(kept.read_bytes()) == len(whole)


def test_a_folder_that_cannot_be_written_costs_time_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").write_text("")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(folder / "file" / "below"))
    values, _ = arrays()
    assert _compiled.compiled(counted)(values, 40) == (values >= 40).sum()


def test_a_loop_that_calls_something_outside_is_left_to_numba(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _compiled.compiled(unfinished)(7)
    assert capsys.readouterr().out.strip() == "7"
    assert not list(folder.glob("*.code"))


@pytest.mark.skipif(sys.platform != "linux", reason="code is kept on Linux only")
def test_decoding_with_kept_code_imports_no_numba(folder: Path) -> None:
    codes = np.random.default_rng(0).integers(0, 16, 10_000).astype(np.uint8)
    np.save(folder / "codes.npy", codes)
    script = f"""
import sys, numpy as np
from pared.store import encode, decode
values = np.load({str(folder / "codes.npy")!r})
name, payload = encode(values, "rans")
assert np.array_equal(decode(name, memoryview(payload), values.shape, values.dtype), values)
print("numba" in sys.modules)
"""
    printed = [subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert [line.strip() for line in printed] == ["True", "False"]
