"""Speed: dense peaks per device, model FLOPs utilisation, step time with compilation apart, device memory.

Every peak is the vendor's dense figure: NVIDIA prints twice as much "with sparsity", which no dense matrix product reaches.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class Peak(NamedTuple):
    """Dense FLOP/s of one JAX device in the unit that a matrix product of this type runs on by default."""

    bfloat16: float
    float32: float  # at JAX's default matmul precision: TF32 on NVIDIA from Ampere on, one bfloat16 pass on TPU


_T = 1e12
# Sources: NVIDIA data sheets of A100, H100 SXM, H200 SXM, L4, L40, L40S, HGX B200 and GB200 (half of the sparse figure where
# only that is printed); Ada white paper for the RTX 4090 (FP32 accumulation); Google Cloud TPU documentation, "System
# architecture", per chip. Cards whose figures could not be confirmed are not here. The first entry whose words all occur in
# the device kind decides, so the special case stands before the general one.
_PEAKS: tuple[tuple[str, Peak], ...] = (
    ("NVIDIA GB200", Peak(2500 * _T, 1250 * _T)),
    ("NVIDIA B200", Peak(2250 * _T, 1100 * _T)),
    ("NVIDIA H200", Peak(989.4 * _T, 494.7 * _T)),
    ("NVIDIA GH200", Peak(989.4 * _T, 494.7 * _T)),
    ("NVIDIA H100", Peak(989.4 * _T, 494.7 * _T)),
    ("NVIDIA A100", Peak(312.0 * _T, 156.0 * _T)),
    ("NVIDIA L40S", Peak(362.05 * _T, 183.0 * _T)),
    ("NVIDIA L40", Peak(181.05 * _T, 90.5 * _T)),
    ("NVIDIA L4", Peak(121.0 * _T, 60.0 * _T)),
    ("NVIDIA GeForce RTX 4090", Peak(165.2 * _T, 82.6 * _T)),
    # JAX shows the two cores of TPU7x as two devices, those of v4 and v5p as one.
    ("TPU v4 lite", Peak(138.0 * _T, 138.0 * _T)),
    ("TPU v4", Peak(275.0 * _T, 275.0 * _T)),
    ("TPU v5 lite", Peak(197.0 * _T, 197.0 * _T)),
    ("TPU v5e", Peak(197.0 * _T, 197.0 * _T)),
    ("TPU v5", Peak(459.0 * _T, 459.0 * _T)),
    ("TPU v6 lite", Peak(918.0 * _T, 918.0 * _T)),
    ("TPU v6e", Peak(918.0 * _T, 918.0 * _T)),
    ("TPU7x", Peak(1153.5 * _T, 1153.5 * _T)),
)
# Cards whose name contains that of another one, with another peak that is not in the table.
_UNLISTED = ("MIG", "Laptop", "Max-Q", "4090 D", "A100X", "H100X", "H100 NVL", "H100 PCIe", "H200 NVL")


def peak_flops(device_kind: str, precision: str = "bfloat16") -> float | None:
    """Dense FLOP/s of one device, None if it is not known.

    Args:
      device_kind: `jax.Device.device_kind`, such as `NVIDIA H100 80GB HBM3` or `TPU v5 lite`.
      precision: `bfloat16` or `float32`, the type of the matrix products.
    """
    words = device_kind.replace("-", " ").split()
    if any(unlisted in device_kind for unlisted in _UNLISTED):
        return None
    for kind, peak in _PEAKS:
        # v5p is listed as "TPU v5" too: JAX has used both names.
        if all(word in words or (word == "v5" and "v5p" in words) for word in kind.split()):
            return getattr(peak, precision)
    return None


def mfu(
    flops_per_token: float, tokens_per_second: float, device_kind: str, n_devices: int, precision: str = "bfloat16"
) -> float | None:
    """Model FLOPs utilisation (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), between 0 and 1.

        flops_per_token * tokens_per_second / (n_devices * peak FLOP/s)

    Args:
      flops_per_token: forward and backward of the model's formula, recomputation not counted.
      tokens_per_second: of the whole run.
      device_kind, precision: as in `peak_flops`.
      n_devices: devices that the mesh uses.

    Returns:
      None where the peak is not known; shown as `n/a`.
    """
    peak = peak_flops(device_kind, precision)
    return None if peak is None else flops_per_token * tokens_per_second / (n_devices * peak)


def device_memory(devices: list[Any] | None = None) -> dict[str, int] | None:
    """Bytes in use, at the peak, and in all, on the fullest of this process's devices.

    Args:
      devices: `jax.local_devices()` by default.

    Returns:
      `bytes_in_use`, `peak_bytes_in_use` and `bytes_limit`, those that the platform reports; None on CPU, which does not.
    """
    import jax

    found: dict[str, int] = {}
    for device in devices or jax.local_devices():
        for name, value in (device.memory_stats() or {}).items():
            if name in ("bytes_in_use", "peak_bytes_in_use", "bytes_limit"):
                found[name] = max(found.get(name, 0), value)
    return found or None


class CompileClock:
    """Wall-clock seconds that JAX has spent tracing, lowering and compiling, from its public monitoring events.

    Events nest (a jitted function traced inside another) and may overlap between threads; each second counts once.
    """

    def __init__(self):
        self._spans: list[tuple[float, float]] = []  # disjoint, ascending
        self._lock = threading.Lock()
        import jax.monitoring

        jax.monitoring.register_event_duration_secs_listener(self._listen)

    @property
    def seconds(self) -> float:
        """Since this object was made."""
        with self._lock:
            return sum(end - start for start, end in self._spans)

    def close(self) -> None:
        """Stops listening."""
        import jax.monitoring

        with contextlib.suppress(ValueError, AssertionError):  # it was closed before
            jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            self._add(time.perf_counter(), duration)

    def _add(self, end: float, duration: float) -> None:
        with self._lock:
            start = end - duration
            while self._spans and self._spans[-1][1] >= start:
                earlier = self._spans.pop()
                start, end = min(start, earlier[0]), max(end, earlier[1])
            self._spans.append((start, end))


class Timer:
    """Seconds a step, with compilation and everything inside `outside()` taken out.

        timer = Timer()
        ...steps...
        with timer.outside():
            ...evaluation, saving...
        row["timing"] = timer.lap(steps=10, tokens=10 * tokens_per_step)

    Args:
      clock: seconds, monotonic.
      compiled: compile seconds so far; default: a `CompileClock` of its own.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, compiled: Callable[[], float] | None = None):
        self._clock = clock
        self._own = CompileClock() if compiled is None else None
        self._compiled = compiled or (lambda: self._own.seconds)
        self._begin = clock()
        self._compiled_before = self._compiled()
        self._outside = 0.0

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """What happens inside is not step time; what it compiles is still reported as compile seconds."""
        begin, compiled = self._clock(), self._compiled()
        try:
            yield
        finally:
            # Compilation in here leaves with the compile seconds; taking it out twice would make steps too fast.
            self._outside += (self._clock() - begin) - (self._compiled() - compiled)

    def lap(self, steps: int, tokens: float) -> dict[str, float]:
        """The interval since the last lap (or since the timer was made), and begins the next one.

        Args:
          steps: updates done in the interval, at least 1.
          tokens: tokens trained on in it, over all devices.

        Returns:
          `step_seconds`, `tokens_per_second`, and `compile_seconds`, the compilation in this interval.
        """
        now, compiled_now = self._clock(), self._compiled()
        compiled = compiled_now - self._compiled_before
        working = max(now - self._begin - self._outside - compiled, 1e-9)
        self._begin, self._compiled_before, self._outside = now, compiled_now, 0.0
        return {"step_seconds": working / steps, "tokens_per_second": tokens / working, "compile_seconds": compiled}

    def close(self) -> None:
        """Stops listening to compilations."""
        if self._own:
            self._own.close()
