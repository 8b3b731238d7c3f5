"""Tuning tables: an entry changes what is taken, and results by rounding alone; malformed tables are refused."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
from kernels import tune, tuning
from kernels.ops import GATES
from kernels.samples import inputs
from kernels.xla.chunked import chunk_size
from strata.errors import ConfigError

SHAPE = (1, 40, 2, 8)
ENTRY = {
    "backend": "xla",
    "op": "kda",
    "dtype": "float32",
    "key_size": 8,
    "value_size": 8,
    "length": 64,
    "rows": 4,
    "chunk_size": 16,
    "measured": {},
}


@pytest.fixture
def table(monkeypatch, tmp_path):
    """`table(*entries)` writes a table of this device; `table(text)` that text. It is the only one."""
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    device = jax.local_devices()[0]

    def write(*entries, name="here.json", device=tuning.device_name(device.device_kind, device.platform)):
        text = entries[0]
        if not isinstance(text, str):
            text = json.dumps({"device": device, "machine": "this machine", "entries": entries})
        (tmp_path / name).write_text(text)
        tuning.tables.cache_clear()

    yield write
    tuning.tables.cache_clear()


def explain(**changes):
    """What `explain` says of a call of kda on SHAPE, with arguments replaced."""
    q, k, v, g, beta = inputs("kda", *SHAPE)
    return kernels.explain("kda", q, k, v, **{"g": g, "beta": beta} | changes)


def test_an_entry_changes_what_is_taken_and_explain_says_so(table):
    table(ENTRY)
    choice = explain()
    assert choice.backend == "xla" and choice.tuned.chunk_size == 16
    assert "chunks of 16: tuned, here.json, measured on this machine" in str(choice)
    assert chunk_size(tune.call_of("kda", inputs("kda", *SHAPE))) == 16


def test_what_a_call_asks_for_goes_before_the_table(table):
    table(ENTRY)
    assert explain(chunk_size=8).tuned == (8, "asked for")


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"key_size": 16}, {"length": 256}, {"rows": 16}, {"op": "gla"}])
def test_without_an_entry_of_exactly_its_key_a_call_takes_the_default(table, change):
    table(ENTRY | change)
    assert explain().tuned == (32, "the default; here.json has no entry for this call")


def test_without_a_table_of_the_device_a_call_takes_the_default(table):
    table(ENTRY, device="another device")
    choice = explain()
    assert choice.tuned.chunk_size == 32 and "the default; no tuning table for" in str(choice)


def test_the_reference_has_nothing_to_tune(table):
    table("{}")  # not even read
    assert explain(backend="reference").tuned is None


@pytest.mark.parametrize("op", ["kda", "simple_gla", "delta_rule"])
def test_results_depend_on_an_entry_by_rounding_alone(table, rms, op):
    x = inputs(op, *SHAPE)

    def results():
        def objective(x):
            return jnp.sum(jnp.square(getattr(kernels, op)(*x, backend="xla")[0]))

        return jax.tree.leaves(jax.jit(jax.value_and_grad(objective))(x))

    table(ENTRY | {"op": op})
    tuned = results()
    table(ENTRY | {"op": op, "chunk_size": 64})
    other = results()
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(tuned, other, strict=True))
    for a, b in zip(tuned, other, strict=True):
        assert rms(a, b) < 1e-5


@pytest.mark.parametrize(
    "text,sentence",
    [
        ("{", "here.json: not JSON"),
        ("[]", "here.json: the file is a list; expected an object with device, machine, entries"),
        ('{"device": "x", "entries": []}', "here.json: the file has no machine"),
        ([ENTRY | {"chunk_size": 48}], r"entries\[0\]: chunk_size = 48; xla takes powers of two from 1 to 256"),
        ([ENTRY | {"backend": "tpu", "chunk_size": 256}], "chunk_size = 256; tpu takes powers of two from 16 to 128"),
        ([ENTRY | {"backend": "triton"}], "backend = 'triton'; expected one of xla, tpu, mosaic_gpu"),
        ([ENTRY | {"op": 3}], "op = 3; expected str"),
        ([ENTRY | {"key_size": True}], "key_size = True; expected int"),
        ([ENTRY | {"length": 65}], "length = 65; expected a power of four"),
        ([ENTRY | {"speed": 2}], "the entry has an unknown field 'speed'"),
        ([{"op": "kda"}], r"entries\[0\]: the entry has no backend"),
        ([ENTRY, ENTRY | {"chunk_size": 32}], r"entries\[1\]: another entry has the same key"),
    ],
)
def test_a_malformed_table_is_refused_with_what_is_wrong(table, text, sentence):
    table(*text) if isinstance(text, list) else table(text)
    with pytest.raises(ConfigError, match=f"(?s)tuning tables are malformed:.*{sentence}"):
        explain()


def test_all_mistakes_of_all_tables_are_listed_at_once(table):
    table(ENTRY | {"rows": 3}, ENTRY | {"chunk_size": 0})
    table("{", name="there.json")
    with pytest.raises(ConfigError) as caught:
        explain()
    assert all(
        part in str(caught.value) for part in ("entries[0]: rows = 3", "entries[1]: chunk_size = 0", "there.json: not JSON")
    )


def test_two_tables_of_one_device_are_refused(table):
    table(ENTRY)
    table(ENTRY, name="there.json")
    with pytest.raises(ConfigError, match=r"there.json: here.json is of the same device"):
        explain()


def unknown_ops(directory) -> set[str]:
    """Ops of the entries of a directory's tables that no call has. Raises where a table is malformed or has no entry."""
    tuning.tables.cache_clear()
    tables = tuning.tables(directory).values()
    assert all(table.entries for table in tables)
    return {entry["op"] for table in tables for entry in table.entries.values()} - set(GATES)


def test_the_tables_of_the_repository_if_any_are_well_formed_and_of_known_ops(table, tmp_path):
    assert not unknown_ops(Path(kernels.__file__).parent / "tables")
    table(ENTRY)
    assert not unknown_ops(tmp_path)
    table(ENTRY, ENTRY | {"op": "gated_delta"})
    assert unknown_ops(tmp_path) == {"gated_delta"}


def test_sizes_are_in_the_class_of_the_next_power_of_four():
    assert [tuning.size_class(n) for n in (1, 2, 4, 5, 1024, 1025, 4096)] == [1, 4, 4, 16, 1024, 4096, 4096]


def test_another_chunk_size_than_the_default_must_be_faster_by_a_margin():
    assert tune.best({32: [0.99, 0.8, 0.99, 0.99], 64: [1.0] * 4}, 64) == 64
    assert tune.best({32: [0.9, 0.8, 0.92, 0.9], 64: [1.0] * 4}, 64) == 32
    assert tune.best({16: [0.5], 64: [1.0] * 4}, 64) == 64  # a first try alone decides nothing


def test_the_tuner_writes_a_table_that_calls_then_take(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    arguments = ["--ops", "kda", "lightnet", "--sizes", "8", "--lengths", "40", "--heads", "2", "--chunks", "16"]
    tune.main([*arguments, "--rounds", "2", "--seconds", "0.001", "--machine", "a machine", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    written = json.loads(path.read_text())
    assert written["machine"] == "a machine" and [entry["op"] for entry in written["entries"]] == ["kda", "lightnet"]
    assert set(written["entries"][0]["measured"]["time_over_default"]) == {"16", "32"}
    assert "measured on a machine" in explain().tuned.reason
    tune.write(path, None, written["device"], [written["entries"][0] | {"chunk_size": 8}])
    assert json.loads(path.read_text())["machine"] == "a machine" and explain().tuned.chunk_size == 8
    tuning.tables.cache_clear()


def test_an_entry_of_lightnet_is_taken_whatever_it_is_given(table):
    x = inputs("lightnet", *SHAPE, dtype="bfloat16")
    key = dict(zip(tuning.KEY, tuning.key_of(tune.call_of("lightnet", x), "xla"), strict=True))
    table(ENTRY | key)
    assert key["dtype"] == "float32" and kernels.explain("lightnet", *x).tuned.chunk_size == 16


def test_an_entry_of_float16_is_found_where_kernels_are_given_float32(monkeypatch, table):
    monkeypatch.setattr(
        tune, "compare", lambda runs, default, *rest: {size: [1.0, 1.0] if size == default else [0.5, 0.5] for size in runs}
    )
    options = argparse.Namespace(chunks=(64,), rounds=2, seconds=0.0)
    entry = tune.tune("linear_attention", "tpu", "float16", SHAPE, options)
    table(ENTRY | entry)
    chosen = kernels.explain(
        "linear_attention", *inputs("linear_attention", *SHAPE, dtype="float16"), backend="tpu", interpret=True
    )
    assert chosen.tuned.chunk_size == 64 and chosen.tuned.reason.startswith("tuned") and chosen.converted == "float32"


@pytest.mark.parametrize("op", GATES)
def test_the_tuner_asks_for_the_call_that_explain_answers_for(op):
    q, k, v, *gates = inputs(op, *SHAPE)
    call = tune.call_of(op, (q, k, v, *gates))
    assert (call.op, call.decay, call.delta) == (op, *GATES[op]) and tuning.key_of(call, "xla")[1:3] == (op, "float32")


@pytest.mark.parametrize(
    "arguments,sentence",
    [(["--rounds", "1"], "--rounds 1: expected at least 2"), (["--chunks", "48"], "48 is not a power of two")],
)
def test_the_tuner_refuses_what_it_cannot_measure_before_it_measures(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        tune.main(["--ops", "gla", *arguments])
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err
