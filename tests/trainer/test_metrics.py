"""metrics.jsonl: every row whole, every float exact, cut back to the byte when a run is resumed."""

import json
import math
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strata import StrataError
from trainer.metrics import MetricsWriter, read_metrics
from trainer.metrics.jsonl import encode, scalars


def row(step: int, **numbers) -> dict:
    return {"step": step, "split": "train", **numbers}


def test_rows_come_back_in_order(tmp_path):
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        writer.write(row(1, loss=2.5, timing={"step_seconds": 0.1, "wall": "12:00"}))
        writer.write({"step": 1, "split": "val", "loss": 2.0, "counts": [1, 2]})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "split": "train", "loss": 2.5, "timing": {"step_seconds": 0.1, "wall": "12:00"}},
        {"step": 1, "split": "val", "loss": 2.0, "counts": [1, 2]},
    ]


@given(st.floats(), st.floats(width=32))
def test_floats_read_back_bit_for_bit(double, single):
    line = json.loads(encode(row(1, double=double, single=np.float32(single))))
    for value, original in ((line["double"], double), (line["single"], single)):
        if math.isnan(original):
            assert value == "NaN"
        else:
            assert struct.pack("d", float(value)) == struct.pack("d", original)


def test_what_json_cannot_say_is_written_as_strings_and_read_as_floats(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(row(1, a=float("nan"), b=np.float32("inf"), c=[-math.inf, 1.0], d={"e": jnp.float32("nan")}))
    strict = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict["a"] == "NaN" and strict["b"] == "Infinity" and strict["c"] == ["-Infinity", 1.0]
    read = read_metrics(path)[0]
    assert math.isnan(read["a"]) and read["b"] == math.inf and read["c"] == [-math.inf, 1.0] and math.isnan(read["d"]["e"])


def test_scalars_of_numpy_and_jax_are_numbers():
    line = json.loads(
        encode({"step": np.int64(3), "split": "train", "a": jnp.int32(2), "b": np.arange(2), "c": True, "d": None})
    )
    assert line == {"step": 3, "split": "train", "a": 2, "b": [0, 1], "c": True, "d": None}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"split": "train"}, "integer step"),
        ({"step": 1.0, "split": "train"}, "integer step"),
        ({"step": True, "split": "train"}, "integer step"),
        ({"step": 1, "split": "test"}, "split"),
        ({"step": 1, "split": "val", "loss": "low"}, "metric loss = 'low' is not a number"),
        ({"step": 1, "split": "val", "a": {"b": object()}}, "metric a.b"),
    ],
)
def test_what_is_no_row_is_refused_and_nothing_is_written(tmp_path, bad, message):
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        with pytest.raises(ValueError, match=message):
            writer.write(bad)
        assert writer.offset == 0
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_row_is_in_the_file_as_soon_as_write_returns(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write(row(1, loss=1.0))
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
    assert writer.offset == (tmp_path / "metrics.jsonl").stat().st_size
    writer.close()


def test_truncating_to_an_offset_gives_the_bytes_of_that_moment(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        for step in range(1, 6):
            writer.write(row(step, loss=1 / step))
            if step == 3:
                offset, then = writer.offset, path.read_bytes()
    with MetricsWriter(path) as writer:
        writer.truncate(offset)
        assert path.read_bytes() == then and writer.offset == offset
        writer.write(row(4, loss=1 / 4))
        writer.write(row(5, loss=1 / 5))
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4, 5]


def test_truncating_to_zero_starts_over(tmp_path):
    with MetricsWriter(tmp_path / "m") as writer:
        writer.write(row(1))
        writer.truncate(0)
        assert writer.offset == 0 and (tmp_path / "m").read_bytes() == b""


@pytest.mark.parametrize("kept", [1, 2])
def test_a_torn_last_line_is_dropped_at_every_byte_of_it(tmp_path, kept):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        for step in range(1, kept + 1):
            writer.write(row(step, loss=0.5))
        good = path.read_bytes()
        writer.write(row(kept + 1, loss=0.25))
        whole = path.read_bytes()
    for size in range(len(good), len(whole)):
        path.write_bytes(whole[:size])
        assert len(read_metrics(path)) == kept
        with MetricsWriter(path) as writer:
            assert writer.offset == len(good)
        assert path.read_bytes() == good


def test_a_torn_line_longer_than_a_block_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = (encode(row(1)) + "\n").encode()
    path.write_bytes(good + b"x" * 200_000)
    with MetricsWriter(path) as writer:
        assert writer.offset == len(good)


def test_a_file_shorter_than_the_checkpoint_remembers_is_an_error(tmp_path):
    with MetricsWriter(tmp_path / "m") as writer:
        writer.write(row(1))
        with pytest.raises(StrataError, match="rows are missing"):
            writer.truncate(writer.offset + 1)
        with pytest.raises(StrataError, match="no row that ends at byte 5"):
            writer.truncate(5)
        assert len(read_metrics(tmp_path / "m")) == 1


def test_a_damaged_line_is_named_by_its_number(tmp_path):
    (tmp_path / "m").write_text('{"step": 1, "split": "train"}\nnonsense\n')
    with pytest.raises(StrataError, match="line 2 of .*m is not a row"):
        read_metrics(tmp_path / "m")


def test_an_unwritable_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StrataError, match="metrics.jsonl cannot be written: Not a directory"):
        MetricsWriter(tmp_path / "file" / "metrics.jsonl")


def test_a_full_disk_costs_no_earlier_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write(row(1))

    class Full:
        """Takes half of a row, then has no room."""

        def __init__(self, file):
            self.file, self.calls = file, 0

        def write(self, data):
            self.calls += 1
            if self.calls == 2:
                raise OSError(28, "No space left on device")
            return self.file.write(data[: len(data) // 2])

        def __getattr__(self, name):
            return getattr(self.file, name)

    real, writer._file = writer._file, Full(writer._file)
    with pytest.raises(StrataError, match="metrics.jsonl cannot be written: No space left on device"):
        writer.write(row(2))
    writer._file = real
    writer.write(row(3))
    writer.close()
    assert [r["step"] for r in read_metrics(path)] == [1, 3]


def test_mirrors_see_flat_names_with_evaluation_speed_apart():
    train = row(1, loss=1.0, alpha=[0.5, {"x": 2}], timing={"mfu": None, "step_seconds": 0.1, "wall": "12:00"})
    assert scalars(train) == {"train/loss": 1.0, "train/alpha/0": 0.5, "train/alpha/1/x": 2, "timing/step_seconds": 0.1}
    assert scalars({"step": 1, "split": "val", "loss": 2.0, "timing": {"seconds": 3.0}}) == {
        "val/loss": 2.0,
        "timing/val/seconds": 3.0,
    }
