import json

import pytest
import torch
from torch import nn

from pared.errors import InputError
from pared.measurement import example_batch, measure, original_bytes
from pared.task import Task


@pytest.fixture
def task():
    x = torch.randn(12, 3, 6, 6)
    y = torch.randint(0, 4, (12,))
    batches = [(x[:8], y[:8]), (x[8:], y[8:])]
    return Task(batches, batches, test=batches[::-1])


def network(width=8):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(width * 16, 4)).eval()


def test_everything_is_measured_and_written(task):
    original, small = network(8), network(4)
    found = measure(small, task, against=original, seconds=0.2)
    macs = 16 * 4 * 27 + 64 * 4
    assert found.macs == macs
    assert found.file_bytes == original_bytes(small)
    assert found.on == "test"
    assert found.against.macs == 16 * 8 * 27 + 128 * 4
    assert found.against.latency_ms["torch"].n == found.latency_ms["torch"].n
    written = json.loads(json.dumps(found.to_json()))
    assert set(written) == {
        "file_bytes", "parameters", "macs", "peak_activation_bytes", "batch_size", "latency_ms", "metric", "drop_pp",
        "agreement",
    }  # fmt: skip
    assert written["latency_ms"]["torch"]["p10"] <= written["latency_ms"]["torch"]["median"]
    assert written["drop_pp"]["on"] == "test"
    assert written["metric"]["name"] == "accuracy"
    assert found.drop_pp.value == pytest.approx(100 * (found.against.metric.value - found.metric.value))


def test_macs_are_per_example_and_memory_per_call(task):
    one, four = (measure(network(), task, runtimes=(), batch_size=n) for n in (1, 4))
    assert one.macs == four.macs
    assert four.peak_activation_bytes == 4 * one.peak_activation_bytes


def test_without_an_original_there_is_no_drop(task):
    found = measure(network(), task, runtimes=())
    assert found.drop_pp is None and "drop_pp" not in found.to_json()


def test_val_stands_in_for_a_missing_test(task):
    task.test = None
    assert measure(network(), task, runtimes=()).on == "val"


def test_a_batch_is_filled_up_with_the_examples_at_hand(task):
    inputs, targets = example_batch(task, 20)
    assert inputs.shape[0] == len(targets) == 20
    assert torch.equal(inputs[8:16], inputs[:8])
    with pytest.raises(InputError, match="batch_size must be at least 1"):
        example_batch(task, 0)


def test_an_unknown_runtime_is_named(task):
    with pytest.raises(InputError, match="did you mean onnxruntime"):
        measure(network(), task, runtimes=("onnxruntme",))


def test_a_task_that_calls_the_model_itself(task):
    class Framed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, *, images):
            return self.inner(images)

    framed = Task(task.train, task.val, forward=lambda model, batch: model(images=batch[0]))
    assert measure(Framed(), framed, seconds=0.2).macs == measure(network(), task, runtimes=()).macs
