"""A file is written whole or not at all; what it holds takes few bytes."""

from __future__ import annotations

import errno
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from pared import artifact, store
from pared.artifact import container, streams
from pared.artifact.tensors import Kind, from_array, same_bits, to_array
from pared.errors import ArtifactError, InputError


def listing(folder) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_whole(call, make, tmp_path, monkeypatch):
    model, path = make("convolutional").model, tmp_path / "a.pared"
    path.write_bytes(b"the old file")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if call == "open":
        monkeypatch.setattr(container, "open", full, raising=False)
    else:
        monkeypatch.setattr(container.os, call, full)
    with pytest.raises(InputError, match=r"a\.pared could not be written .*No space left on device; .*unchanged"):
        artifact.save(model, path)
    monkeypatch.undo()
    assert path.read_bytes() == b"the old file"
    assert listing(tmp_path) == {"a.pared"}


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_a_file_that_grows_beyond_its_limit_leaves_nothing_behind(tmp_path):
    code = (
        "import resource, signal, sys; from pathlib import Path; from pared.artifact import container\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "container.write(Path(sys.argv[1]), bytes(100_000))"
    )
    (tmp_path / "a.pared").write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a.pared"], capture_output=True, text=True)
    assert "InputError" in done.stderr and "File too large" in done.stderr
    assert (tmp_path / "a.pared").read_bytes() == b"old"
    assert listing(tmp_path) == {"a.pared"}


def test_an_interrupt_while_writing_leaves_the_old_file_whole(tmp_path, monkeypatch):
    (tmp_path / "a.pared").write_bytes(b"old")

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(container.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        container.write(tmp_path / "a.pared", b"new")
    assert (tmp_path / "a.pared").read_bytes() == b"old" and listing(tmp_path) == {"a.pared"}


def test_a_folder_that_does_not_exist_is_named(make, tmp_path):
    with pytest.raises(InputError, match="nowhere.*No such file"):
        artifact.save(make("convolutional").model, tmp_path / "nowhere" / "a.pared")


def test_a_link_stays_a_link(make, tmp_path):
    (tmp_path / "real.pared").write_bytes(b"old")
    (tmp_path / "link.pared").symlink_to("real.pared")
    artifact.save(make("convolutional").model, tmp_path / "link.pared")
    assert (tmp_path / "link.pared").is_symlink()
    artifact.load(tmp_path / "real.pared")


@pytest.mark.parametrize("prefer", ["fastest", "huffman", "rans", "raw"])
def test_every_coder_gives_the_same_model(prefer, make, tmp_path, same):
    it = make("convolutional", "deep")
    artifact.save(it.model, tmp_path / "b.pared", store=prefer)
    with torch.no_grad():
        assert same(artifact.load(tmp_path / "b.pared")(*it.args), it.model(*it.args))
    assert (tmp_path / "b.pared").stat().st_size >= len(it.file) - 16


def test_an_unknown_coder_is_refused(make, tmp_path):
    with pytest.raises(InputError, match="store must be smallest, fastest or one of"):
        artifact.save(make("convolutional").model, tmp_path / "b.pared", store="zip")


def test_small_tensors_that_resemble_each_other_share_a_stream():
    rng = np.random.default_rng(0)
    arrays = [(f"{n}.bias", (rng.standard_normal(40) * 0.1).astype(np.float32)) for n in range(40)]
    arrays.insert(7, ("7.weight", rng.standard_normal((50, 50)).astype(np.float32)))
    data = streams.Streams(arrays, "smallest")
    together = sum(len(payload) for _, payload in data.payloads)
    apart = sum(len(store.encode(array)[1]) for _, array in arrays)
    assert together < apart - 40
    assert all(7 not in group for group in data.groups)
    kinds = [Kind.of(torch.from_numpy(array)) for _, array in arrays]
    streams.check_groups(kinds, data.groups)
    payloads = [(coder, memoryview(payload)) for coder, payload in data.payloads]
    decoded = streams.decode(payloads, kinds, [path for path, _ in arrays], data.coders, data.groups)
    assert all(np.array_equal(a, b) for (_, a), b in zip(arrays, decoded, strict=True))


@pytest.mark.parametrize("groups", [[[0]], [[1, 0]], [[0, 0]], [[0, 1], [1, 2]], [[0, 9]], [[0, 3]], [[0, 4]], [[]]])
def test_groups_that_make_no_sense_are_refused(groups):
    kinds = [Kind(torch.float32, (4,))] * 3 + [Kind(torch.int8, (4,)), Kind(torch.float32, (0,))]
    with pytest.raises(ArtifactError, match="group"):
        streams.check_groups(kinds, groups)


@pytest.mark.parametrize("shape", [(), (3,), (2, 0, 3), (2, 3, 4)])
def test_arrays_of_every_type_come_back_bit_for_bit(shape):
    from pared.artifact.tensors import DTYPES

    for dtype in DTYPES.values():
        bits = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), dtype=torch.uint8)
        tensor = bits.view(dtype).reshape(shape) if bits.numel() else torch.empty(shape, dtype=dtype)
        array = to_array(tensor)
        assert (array.dtype, array.shape) == Kind.of(tensor).carrier
        assert same_bits(from_array(array, Kind.of(tensor)), tensor)


def test_views_and_conjugates_are_stored_as_they_are_seen(tmp_path):
    model = nn.Module()
    base = torch.randn(6, 4)
    model.register_buffer("turned", base.t())
    model.register_buffer("conjugate", torch.randn(3, dtype=torch.complex64).conj())
    model.register_buffer("negative", torch.randn(3, dtype=torch.complex64).conj().imag)
    artifact.save(model, tmp_path / "a.pared", program=False)
    twin = nn.Module()
    for name, value in model.state_dict().items():
        twin.register_buffer(name, torch.zeros_like(value.resolve_conj().resolve_neg()))
    artifact.load(tmp_path / "a.pared", twin)
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in model.state_dict().items())


def test_saving_needs_little_memory_beside_the_model(tmp_path):
    code = (
        "import resource, sys, torch\nfrom torch import nn\nfrom pared import artifact\ntorch.set_num_threads(1)\n"
        "artifact.save(nn.Linear(8, 8), sys.argv[1] + '/s.pared', program=False)\n"
        "model = nn.Linear(4000, 4000, bias=False)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "artifact.save(model, sys.argv[1] + '/a.pared', program=False)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 12 * 4000 * 4000 * 4
