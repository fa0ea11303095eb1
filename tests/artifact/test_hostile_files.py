"""Whatever a file holds: it is refused with an ArtifactError, or it is a valid model. No other exception, no large memory."""

from __future__ import annotations

import json
import os
import pickle
import random
import time

import pytest
import torch
from torch import nn

from pared import artifact, registry
from pared.artifact import container
from pared.artifact.body import DIGEST_BYTES, Body, Reader
from pared.artifact.compression import pack, unpack
from pared.artifact.manifest import loads
from pared.errors import ArtifactError, InputError


@pytest.fixture
def opened(make, fuzz):
    """The inside of a file, to be changed and sealed again."""
    return fuzz.Opened.of(make("convolutional", "deep").file)


@pytest.fixture
def refused(tmp_path):
    def check(file: bytes, match: str, **options) -> None:
        path = tmp_path / "hostile.pared"
        path.write_bytes(file)
        with pytest.raises(ArtifactError, match=match):
            artifact.load(path, **options)

    return check


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    artifact.save(nn.Linear(3, 2), tmp_path / "a.pared", example=torch.randn(2, 3))
    file = (tmp_path / "a.pared").read_bytes()
    for length in range(len(file)):
        (tmp_path / "b.pared").write_bytes(file[:length])
        for model in (None, nn.Linear(3, 2)):
            with pytest.raises(ArtifactError):
                artifact.load(tmp_path / "b.pared", model)
        with pytest.raises(ArtifactError):
            artifact.inspect(tmp_path / "b.pared")
    (tmp_path / "b.pared").write_bytes(file + b"\0")
    with pytest.raises(ArtifactError):
        artifact.load(tmp_path / "b.pared")


def test_damage_is_refused_or_changes_nothing(fuzz, tmp_path):
    fuzz.real_file(tmp_path / "a.pared")
    found = fuzz.run(tmp_path / "a.pared", tmp_path / "b.pared", 500, seed=7, kinds=("damaged",))
    assert not found["failures"], found["failures"][:5]
    assert sum(found["outcomes"]["damaged"].values()) == 500
    assert "other" not in found["outcomes"]["damaged"]


def test_hostile_files_are_refused_or_valid_models_within_bounds(fuzz, tmp_path):
    fuzz.real_file(tmp_path / "a.pared")
    found = fuzz.run(tmp_path / "a.pared", tmp_path / "b.pared", 500, seed=8, kinds=("hostile",))
    assert not found["failures"], found["failures"][:5]
    assert found["outcomes"]["hostile"]["refused"] > 250
    assert found["outcomes"]["hostile"]["other"] > 0, "no mutation came through the decoders"
    assert found["memory_growth_mb"] < 20 * fuzz.MAX_BYTES / 1e6
    assert found["slowest_load_s"] < 30


def test_hostile_files_do_no_more_harm_with_the_class_at_hand(fuzz, tmp_path):
    fuzz.real_file(tmp_path / "a.pared")
    file = (tmp_path / "a.pared").read_bytes()
    expected = fuzz.tensors_of(artifact.load(tmp_path / "a.pared", fuzz.Residual()))
    outcomes = [
        fuzz.judge(fuzz.hostile(file, random.Random(number)), tmp_path / "b.pared", expected, fuzz.Residual)
        for number in range(100)
    ]
    assert "refused" in outcomes and "same" in outcomes


@pytest.mark.parametrize(
    "file",
    [b"", b"\0" * 8, b"\xff" * 64, pickle.dumps({"a": 1}), b"PK\x03\x04" + b"\0" * 100, os.urandom(4096)],
    ids=["empty", "zeros", "ones", "pickle", "zip", "noise"],
)
def test_other_files_are_refused(file, refused):
    refused(file, "not a .pared file|cut off")


def test_a_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="check the path"):
        artifact.load(tmp_path / "nothing.pared")


def test_headers_are_parsed_strictly(make, refused):
    body = bytes(container.unwrap(memoryview(make("convolutional").file)))

    def with_header(text: str) -> bytes:
        return len(text).to_bytes(8, "little") + text.encode() + body

    good = {"dtype": "U8", "shape": [len(body)], "data_offsets": [0, len(body)]}
    refused(with_header(json.dumps({"pared": {**good, "data_offsets": [0, len(body) - 1]}})), "header")
    refused(with_header(json.dumps({"pared": {**good, "dtype": "I8"}})), "header")
    refused(with_header(json.dumps({"other": good})), "one entry")
    refused(with_header(json.dumps({"pared": good, "more": good})), "one entry")
    refused(with_header(f'{{"pared":{json.dumps(good)},"pared":{json.dumps(good)}}}'), "not JSON")
    refused(with_header("[" * 60_000), "not JSON")
    refused((1 << 62).to_bytes(8, "little") + body, "length of its header")


def test_text_that_other_tools_add_to_the_header_does_no_harm(make, tmp_path, same):
    from safetensors.numpy import load_file, save_file

    it = make("convolutional", "deep")
    save_file(load_file(tmp_path / "a.pared"), tmp_path / "b.pared", metadata={"note": "copied"})
    with torch.no_grad():
        assert same(artifact.load(tmp_path / "b.pared")(*it.args), it.model(*it.args))


def test_newer_versions_are_named(make, refused):
    body = bytearray(container.unwrap(memoryview(make("convolutional").file)))
    body[0] = 2
    refused(bytes(container.wrap([bytes(body)])), "version 1, found version 2.*newer pared")


def test_every_single_bit_after_the_version_is_sealed(make):
    body = bytes(container.unwrap(memoryview(make("convolutional").file)))
    rng = random.Random(0)
    for at in [*range(1, 60), *(rng.randrange(1, len(body)) for _ in range(200))]:
        changed = bytearray(body)
        changed[at] ^= 1 << rng.randrange(8)
        with pytest.raises(ArtifactError, match="sha256"):
            Reader(memoryview(bytes(changed)))


def test_tensors_have_a_digest_of_their_own(opened, refused):
    opened.digest = bytes(DIGEST_BYTES)
    refused(opened._wrapped(), "tensors decode to others")


def test_sizes_are_checked_before_anything_is_allocated(opened, refused):
    opened.manifest["shapes"][0] = [1 << 20, 1 << 18]
    start = time.perf_counter()
    refused(opened.sealed(), "bytes, .* are allowed.*max_bytes")
    assert time.perf_counter() - start < 5


def test_max_bytes_is_what_the_caller_says(make, tmp_path):
    make("convolutional")
    with pytest.raises(ArtifactError, match="larger max_bytes"):
        artifact.load(tmp_path / "a.pared", max_bytes=1000)
    artifact.load(tmp_path / "a.pared", max_bytes=100_000)


def test_a_few_bytes_do_not_become_gigabytes(refused):
    def bomb(shape: list[int]) -> bytes:
        manifest = {"tensors": [[["weight"]], [""], [0]], "shapes": [shape], "coders": ["constant"]}
        return bytes(container.wrap(Body(bytes(DIGEST_BYTES), json.dumps(manifest).encode(), [(0, b"\0" * 4)]).parts(1)))

    refused(bomb([1 << 30]), "are allowed")
    refused(bomb([1 << 62, 1 << 62, 0]), "whole number below")


def test_compressed_manifests_do_not_explode():
    text = b"[" + b"0," * 1_000_000 + b"0]"
    method, data = pack(text)
    with pytest.raises(ArtifactError, match="must not become"):
        unpack(method, data, len(text))
    with pytest.raises(ArtifactError, match="bytes, found"):
        unpack(method, data, 70_000)


@pytest.mark.parametrize("text", [b"", b"NaN", b"{", b"[" * 200_000, b'{"shapes":[' + b"9" * 5000 + b"]}", b"\xff"])
def test_manifests_that_are_no_json_are_refused(text):
    with pytest.raises(ArtifactError, match="must be JSON"):
        loads(text)


def test_manifests_survive_every_method_of_compression():
    for text in (b"", b"{}", os.urandom(300), json.dumps({"tensors": [["weight", "bias"]] * 400}).encode()):
        method, data = pack(text)
        assert unpack(method, data, len(text)) == text


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "quantize.__init__", "..quantize.integer", "artifact.write"])
def test_techniques_are_looked_up_in_the_registry_only(name, opened, refused):
    opened.manifest["techniques"][0] = [name]
    refused(opened.sealed(), "there is no technique")


def test_settings_are_validated(opened, refused):
    row = next(row for row in opened.manifest["techniques"] if row[0] == "quantize.codebook")
    row[1:] = [{"bits": 99}]
    refused(opened.sealed(), "quantize.codebook.bits must be .* got 99")


@pytest.mark.parametrize("name", ["__class__", "forward", "_parameters", ""])
def test_names_that_would_break_a_module_are_refused(name, opened, refused):
    opened.manifest["tensors"][0][0][0] = name
    refused(opened.sealed(), "is not free as a name in a module")


def test_codes_outside_their_table_are_refused(make, fuzz, refused):
    import numpy as np

    from pared import store
    from pared.artifact.read import Contents

    file = make("convolutional", "codebook").file
    opened, contents = fuzz.Opened.of(file), Contents(file)
    number = next(i for i, (path, _) in enumerate(contents.stored) if path.endswith("body.parametrizations.weight.0.decoder.codes"))
    stream = next(i for i, members in enumerate(contents.members) if number in members)
    codes = np.full(sum(contents.stored[member][1].numel for member in contents.members[stream]), 200, np.uint8)
    name, payload = store.encode(codes, "raw")
    opened.manifest["coders"] = [*contents.manifest.coders, name]
    opened.streams[stream] = (len(contents.manifest.coders), payload)
    refused(opened.sealed(), r"weight: codes must be less than 8, found 200")


def test_whatever_a_technique_raises_becomes_an_artifact_error(make, tmp_path, monkeypatch):
    make("convolutional", "integer")
    cls = registry.get("quantize.integer")
    for error in (ValueError("odd"), RuntimeError("torch"), KeyError("k"), MemoryError(), OverflowError("o"), RecursionError("r")):

        def build(self, site, structure, error=error):
            raise error

        monkeypatch.setattr(cls, "build", build)
        with pytest.raises(ArtifactError, match=r"a\.pared is damaged.*" + type(error).__name__):
            artifact.load(tmp_path / "a.pared")
