"""Peaks, utilisation, and step time with compilation apart."""

import jax
import jax.numpy as jnp
import pytest

from trainer.metrics.throughput import CompileClock, Timer, device_memory, mfu, peak_flops


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100-PCIE-40GB", 312.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("TPU v4", 275.0),
        ("TPU v5 lite", 197.0),
        ("TPU v5", 459.0),
        ("TPU v5p", 459.0),
        ("TPU v6 lite", 918.0),
        ("TPU7x", 1153.5),
    ],
)
def test_device_kinds_as_jax_spells_them_have_their_dense_peak(kind, tera):
    assert peak_flops(kind) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize(
    "kind",
    [
        "cpu",
        "",
        "NVIDIA H100 PCIe",
        "NVIDIA H100 NVL",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "TPU v9",
        "AMD Instinct MI300X",
    ],
)
def test_an_unknown_device_has_no_peak_and_no_utilisation(kind):
    assert peak_flops(kind) is None and mfu(1e9, 1e6, kind, 1) is None


def test_no_peak_is_a_sparse_one():
    # Hopper's sparse bfloat16 figure is 1979; taking it would halve every utilisation.
    assert peak_flops("NVIDIA H200") < 1000e12
    assert peak_flops("NVIDIA H200", "float32") == pytest.approx(peak_flops("NVIDIA H200") / 2)


def test_utilisation_is_the_share_of_all_devices():
    # 6e9 FLOPs a token at 989.4e12 / 6e9 tokens a second is exactly one H100.
    assert mfu(6e9, 989.4e12 / 6e9, "NVIDIA H100 80GB HBM3", 1) == pytest.approx(1.0)
    assert mfu(6e9, 989.4e12 / 6e9, "NVIDIA H100 80GB HBM3", 8) == pytest.approx(1 / 8)


def test_memory_is_none_where_the_platform_does_not_say():
    class Device:
        def __init__(self, stats):
            self.stats = stats

        def memory_stats(self):
            return self.stats

    assert device_memory([Device(None)]) is None
    two = [Device({"bytes_in_use": 1, "bytes_limit": 9, "other": 5}), Device({"bytes_in_use": 3, "bytes_limit": 9})]
    assert device_memory(two) == {"bytes_in_use": 3, "bytes_limit": 9}


class Clocks:
    def __init__(self):
        self.now = self.compiled = 0.0

    def timer(self) -> Timer:
        return Timer(clock=lambda: self.now, compiled=lambda: self.compiled)

    def work(self, seconds: float, compiled: float = 0.0) -> None:
        self.now += seconds + compiled
        self.compiled += compiled


def test_compilation_is_not_step_time():
    clocks = Clocks()
    timer = clocks.timer()
    clocks.work(2.0, compiled=30.0)
    assert timer.lap(4, 1000) == {"step_seconds": 0.5, "tokens_per_second": 500.0, "compile_seconds": 30.0}
    clocks.work(1.0)
    assert timer.lap(4, 1000) == {"step_seconds": 0.25, "tokens_per_second": 1000.0, "compile_seconds": 0.0}


def test_what_happens_outside_is_not_step_time_and_its_compilation_is_taken_out_once():
    clocks = Clocks()
    timer = clocks.timer()
    clocks.work(1.0)
    with timer.outside():
        clocks.work(7.0, compiled=5.0)
    clocks.work(1.0, compiled=3.0)
    assert timer.lap(2, 100) == {"step_seconds": 1.0, "tokens_per_second": 50.0, "compile_seconds": 8.0}


def test_nested_and_overlapping_compile_events_count_each_second_once():
    clock = CompileClock()
    try:
        clock._spans.clear()
        clock._add(10.0, 1.0)  # 9..10
        clock._add(12.0, 1.0)  # 11..12
        assert clock.seconds == pytest.approx(2.0)
        clock._add(12.5, 4.0)  # 8.5..12.5 holds both
        assert clock.seconds == pytest.approx(4.0)
        clock._add(13.0, 1.0)  # overlaps by half
        assert clock.seconds == pytest.approx(4.5)
    finally:
        clock.close()


def test_jax_reports_a_compilation_and_none_for_a_cached_call():
    clock = CompileClock()
    try:
        step = jax.jit(lambda x: jnp.tanh(x @ x).sum() + 0.125)
        x = jnp.ones((9, 9))
        step(x).block_until_ready()
        first = clock.seconds
        assert first > 0
        step(x).block_until_ready()
        assert clock.seconds == first
    finally:
        clock.close()


def test_a_closed_clock_hears_nothing():
    clock = CompileClock()
    clock.close()
    clock.close()
    jax.jit(lambda x: x * 3.25)(jnp.ones(5)).block_until_ready()
    assert clock.seconds == 0
