"""Compile every Hopper kernel for sm_90a with the real compiler, without a GPU, and keep the registers and spills of each.

    pip install 'jax[cuda13]==0.11.2'          # Python 3.12; a large environment, and needed for nothing else here
    python -m kernels.mosaic_gpu.compiled            # compile what changed, compare with registers.json
    python -m kernels.mosaic_gpu.compiled --write    # and record; a count that grew needs --allow_growth as well

A spilled register fails, recorded or not. A specialised kernel always starts with the same number, so that only spills tell how
many its warpgroups need. `registers.json` holds the hash of the sources that it was made from, so that unchanged kernels cost
nothing. A part may be compiled alone: what else the file holds is kept as long as sources and versions are the same, and
otherwise as `earlier`, for comparison only.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from kernels.mosaic_gpu.limits import STARTING, too_wide

HERE = Path(__file__).parent
RECORD = HERE / "registers.json"
SOURCES = (
    "across.py",
    "decays.py",
    "gradients.py",
    "layout.py",
    "limits.py",
    "outputs.py",
    "pairs.py",
    "pipeline.py",
    "states.py",
    "tiles.py",
)
SHAPE = {"batch": 2, "length": 16384, "heads": 16, "key_size": 128, "value_size": 128}
WIDE = {"value_size": 256}
"""Each form that is served is compiled with values of this size as well."""
NARROW = {"value_size": 64}
"""Each form in bfloat16 too: with one tile of V its states pass on one warpgroup."""
SEQUENCES = 32
"""Of a packed row."""
SIZES = ("", "wide", "narrow")
ROWS = ("", "dense", "packed")
"""With segments, one sequence each, or all sequences in one."""
VARIANTS = tuple(f"{size} {rows}".strip() or "usual" for rows in ROWS for size in SIZES)
SIZE_OF_FLOAT32_DELTA = 64
FORMS = (("none", False), ("scalar", False), ("vector", False), ("none", True), ("scalar", True), ("vector", True))
DEVICE = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 62914560
  clock_rate_ghz: 1.98
  device_memory_size: 150000000000
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
"""
"""What the compiler is told of an H200."""


def source_hash() -> str:
    """Of everything that decides what is compiled."""
    text = b"".join((HERE / name).read_bytes() for name in SOURCES)
    return hashlib.sha256(
        text + json.dumps([SHAPE, WIDE, NARROW, SEQUENCES, SIZE_OF_FLOAT32_DELTA, FORMS]).encode()
    ).hexdigest()[:16]


def recorded() -> dict[str, Any]:
    """The record; empty if there is none."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def runs(decay: str, delta: bool, dtype: str, variant: str, sharding: Any) -> dict[str, Any]:
    """The forward and the backward pass of one form and variant, on shapes: name -> (function, arguments)."""
    import jax

    from kernels.mosaic_gpu import chunked
    from kernels.mosaic_gpu.layout import Form

    wide, packed = "wide" in variant, "packed" in variant
    segmented = not packed and "dense" not in variant
    changed = WIDE if wide else NARROW if "narrow" in variant else {}
    batch, length, heads, key_size, value_size = (SHAPE | changed).values()
    if dtype == "float32" and delta:
        key_size, value_size = SIZE_OF_FLOAT32_DELTA, value_size if wide else SIZE_OF_FLOAT32_DELTA
    form = Form(decay, delta, segmented, packed, key_size**-0.5, 1, dtype == "float32", None)
    states = batch
    if packed:
        batch, length, states = 1, batch * length, SEQUENCES

    def array(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    keys, values = (array(batch, length, heads, size, dtype=dtype) for size in (key_size, value_size))
    gate = array(batch, length, heads)
    g = {"none": None, "scalar": gate, "vector": array(*keys.shape)}[decay]
    beta = gate if delta else None
    segments = array(batch, length, dtype="int32") if segmented else None
    bounds = array(SEQUENCES + 1, dtype="int32") if packed else None
    state = array(states, heads, key_size, value_size)
    inputs = (keys, keys, values, g, beta, segments, bounds, state)

    def forward(*inputs: Any) -> Any:
        return chunked.forward(form, *inputs)

    residuals = jax.tree.map(lambda x: array(*x.shape, dtype=str(x.dtype)), jax.eval_shape(forward, *inputs)[1])

    def backward(residuals: Any, cotangents: Any) -> Any:
        return chunked.backward(form, residuals, cotangents)

    return {"forward": (forward, inputs), "backward": (backward, (residuals, (values, state)))}


def name(decay: str, delta: bool) -> str:
    """Of a form, as in the record."""
    return f"{decay}_decay_{'delta_rule' if delta else 'additive'}"


def cases(
    dtypes: Iterable[str], forms: Collection[str] = (), variants: Iterable[str] = VARIANTS
) -> Iterator[tuple[str, bool, str, str]]:
    """(decay, delta, dtype, variant) of all that is served, or of some forms and variants."""
    for (decay, delta), dtype, variant in itertools.product(FORMS, dtypes, variants):
        left_out = "wide" in variant and too_wide(decay, dtype, WIDE["value_size"])
        left_out |= "narrow" in variant and dtype == "float32"  # there a number of tiles makes no other kernel
        if not left_out and (not forms or name(decay, delta) in forms):
            yield decay, delta, dtype, variant


def compile_all(dtypes: list[str], forms: list[str], variants: list[str], dump: Path) -> dict[str, dict[str, int]]:
    """Registers and bytes of spills of every kernel. Raises what the compiler raises."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    topology = topologies.get_topology_desc("h200", platform="cuda", topology="1x1x1", target_config=DEVICE)
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
    found: dict[str, dict[str, int]] = {}
    for decay, delta, dtype, variant in cases(dtypes, forms, variants):
        with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
            for way, (run, arguments) in runs(decay, delta, dtype, variant, sharding).items():
                shutil.rmtree(dump, ignore_errors=True)
                dump.mkdir(parents=True)
                jax.jit(run).lower(*arguments).compile()
                for kernel, counts in report(dump).items():
                    key = f"{kernel} {dtype}{'' if variant == 'usual' else f' {variant}'}"
                    found[key] = counts
                    print(f"{way:8} {key:50} {counts['registers']:4} registers, {counts['spilled']} bytes spilled", flush=True)
    return found


def report(dump: Path) -> dict[str, dict[str, int]]:
    """What the assembler said of the kernels it wrote about in a folder; the most of one that is there in several shapes."""
    found: dict[str, dict[str, int]] = {}
    for path in sorted(dump.glob("*.ptxas")):
        text = path.read_text()
        kernel = re.search(r"Compiling entry function '(\w+?)_mosaic_gpu_kernel'", text)
        registers = re.search(r"Used (\d+) registers", text)
        spills = [int(count) for count in re.findall(r"(\d+) bytes spill", text)]
        if kernel is None or registers is None or not spills:
            raise SystemExit(f"error: the assembler's report is not as expected: {text!r}")
        specialised = "setmaxnreg" in path.with_suffix(".ptx").read_text()
        if specialised and (int(registers[1]) != STARTING or "ignored" in text):
            raise SystemExit(
                f"error: {kernel[1]} starts with {registers[1]} registers, which would hang or not be changed: {text!r}"
            )
        before = found.get(kernel[1], {"registers": 0, "spilled": 0})
        counts = {"registers": int(registers[1]), "spilled": sum(spills)}
        found[kernel[1]] = {name: max(count, before[name]) for name, count in counts.items()}
    return found


def spilling(found: dict[str, dict[str, int]]) -> list[str]:
    """Sentences about kernels that spill."""
    return [f"{key} spills {counts['spilled']} bytes" for key, counts in found.items() if counts["spilled"]]


def worse(found: dict[str, dict[str, int]], before: dict[str, dict[str, int]]) -> list[str]:
    """Sentences about kernels that spill, and about counts that are larger than recorded."""
    return spilling(found) + [
        f"{key} has {counts['registers']} registers, was {before[key]['registers']}"
        for key, counts in found.items()
        if counts["registers"] > before.get(key, counts)["registers"]
    ]


def merged(
    found: dict[str, dict[str, int]], record: dict[str, Any], source: str, versions: dict[str, str]
) -> dict[str, dict[str, dict[str, int]]]:
    """The counts of a new record: `kernels`, compiled now or held by a record of the same sources and versions; and `earlier`,
    where there are any, of kernels not compiled since sources or versions changed.
    """
    same = record.get("source") == source and record.get("versions") == versions
    kernels = (record["kernels"] if same else {}) | found
    earlier = {key: counts for key, counts in known(record).items() if key not in kernels}
    return {"kernels": kernels} | ({"earlier": earlier} if earlier else {})


def known(record: dict[str, Any]) -> dict[str, dict[str, int]]:
    """The last counts of every kernel, of these sources or of earlier ones: what new counts are compared with."""
    return record.get("earlier", {}) | record.get("kernels", {})


def main(argv: list[str] | None = None) -> None:
    """Compile, compare, record."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    made.add_argument("--forms", nargs="+", default=[], help="names of forms, as scalar_decay_additive; all unless given")
    made.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="such as 'wide dense'")
    made.add_argument("--write", action="store_true", help="record the counts")
    made.add_argument("--allow_growth", action="store_true", help="record counts that grew, too; spills never")
    options = made.parse_args(argv)
    record = recorded()
    if record.get("source") == source_hash() and not options.write:
        print("unchanged since it was compiled")
        return
    dump = Path(tempfile.mkdtemp()) / "ptx"
    # Read when a kernel is compiled.
    os.environ |= {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_TO": str(dump)}
    found = compile_all(options.dtypes, options.forms, options.variants, dump)
    shutil.rmtree(dump.parent)
    complaints = worse(found, known(record))
    print("\n".join(complaints))
    if options.write and not spilling(found) and (options.allow_growth or not complaints):
        versions = {name: importlib.metadata.version(name) for name in ("jax", "nvidia-cuda-nvcc")}
        counts = merged(found, record, source_hash(), versions)
        record = {"source": source_hash(), "versions": versions, "shape": SHAPE, "wide": WIDE, "narrow": NARROW} | counts
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        print(f"written to {RECORD}")
    elif complaints:
        sys.exit(1)


if __name__ == "__main__":
    main()
