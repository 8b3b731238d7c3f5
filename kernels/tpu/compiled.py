"""Compile every TPU kernel with the real compiler, without a TPU, and keep the number of scheduled instruction bundles.

    pip install libtpu
    python -m kernels.tpu.compiled            # compile what changed, compare with bundles.json
    python -m kernels.tpu.compiled --write    # and record; a count that grew needs --allow_growth as well
    python -m kernels.tpu.compiled --write --targets v6e --dtypes float32 --forms scalar_decay_additive

Compiled is every form that is served, at the usual size and at the largest, and packed rows at the usual one. A bundle is what
a TPU core issues in one cycle at best. Counts rank variants of a kernel; they are no times: stalls on memory are not in them.
A kernel that overflows VMEM, or that the compiler rejects, fails here. `bundles.json` holds the hash of the sources that it was
made from, so that unchanged kernels cost nothing. A part may be compiled alone, long ones in float32 say: what else the file
holds is kept as long as sources and versions are the same, and otherwise as `earlier`: what has not been compiled since is
missing for the tests, but its growth is still seen.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from kernels.tpu.limits import CHUNK, LARGEST_SIZE, USUAL_SIZE, heads_a_step, too_large

HERE = Path(__file__).parent
RECORD = HERE / "bundles.json"
SOURCES = ("algebra.py", "backward.py", "forward.py", "layout.py")
SHAPE = {"batch": 2, "length": 16384, "heads": 16}
DTYPES = ("bfloat16", "float32")
FORMS = (("none", False), ("scalar", False), ("vector", False), ("none", True), ("scalar", True), ("vector", True))
WAYS = ("forward", "backward", "inference", "dense_forward", "dense_backward", "packed_forward", "packed_backward")
"""With segments, forward keeping what backward needs; dense: the same two passes of rows that are one sequence each, and
inference the forward one of these that keeps nothing. Packed rows, at the usual size alone: sequences in chunks of their own.
"""
SEQUENCES = 32
"""Of a packed row."""
Counts = dict[str, dict[str, int]]
"""Target -> kernel, way and dtype -> scheduled bundles."""
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "TPU7x": "tpu7x:2x2x1"}


class Target(NamedTuple):
    """A topology to compile for, and K = V."""

    topology: str
    size: int


TARGETS = {name: Target(topology, USUAL_SIZE) for name, topology in TOPOLOGIES.items()}
TARGETS |= {f"{name}_{LARGEST_SIZE}": Target(topology, LARGEST_SIZE) for name, topology in TOPOLOGIES.items()}


def source_hash() -> str:
    """Of everything that decides what a count is; which counts there are is told by their names."""
    text = b"".join((HERE / name).read_bytes() for name in SOURCES)
    heads = [
        heads_of(decay, delta, dtype, target.size) for target in TARGETS.values() for decay, delta in FORMS for dtype in DTYPES
    ]
    static = [SHAPE, SEQUENCES, TARGETS, CHUNK, heads]
    return hashlib.sha256(text + json.dumps(static).encode()).hexdigest()[:16]


def heads_of(decay: str, delta: bool, dtype: str, size: int) -> int:
    """Heads a grid step of what is compiled."""
    return heads_a_step(decay, delta, SHAPE["heads"], dtype, size, size)


def kinds(target: str) -> list[tuple[str, bool, str]]:
    """What the kernels serve at the size of a target: decay, delta and dtype."""
    size = TARGETS[target].size
    every = [(decay, delta, dtype) for decay, delta in FORMS for dtype in DTYPES]
    return [kind for kind in every if not too_large(*kind, size, size)]


def ways(target: str) -> list[str]:
    """Of running a kernel that are compiled for a target."""
    return [way for way in WAYS if TARGETS[target].size == USUAL_SIZE or not way.startswith("packed")]


def names(target: str) -> list[str]:
    """Of everything that is compiled for a target: form, way and dtype."""
    return [
        f"{decay}_decay_{'delta_rule' if delta else 'additive'} {way} {dtype}"
        for decay, delta, dtype in kinds(target)
        for way in ways(target)
    ]


def recorded() -> dict[str, Any]:
    """The record; empty if there is none."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def operands(form: Any, way: str, dtype: str, size: int, device: Any) -> tuple[Any, dict[str, Any], Any, Any]:
    """Shapes on a device, K = V = `size`: the operands, what the forward pass keeps, cotangents of o and of the final state."""
    import jax

    from kernels.tpu.layout import Operands

    sharding = jax.sharding.SingleDeviceSharding(device)

    def array(*shape: int, dtype: str = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    batch, length, heads = SHAPE.values()
    states, packed = batch, way.startswith("packed")
    if packed:
        batch, length, states = 1, batch * length, SEQUENCES
    count = length // form.chunk
    keys = array(batch, heads, length, size)
    state = array(states, heads, size, size, dtype="float32")
    gates = {
        "none": None,
        "scalar": array(batch, heads, count, 2, form.chunk, dtype="float32"),
        "vector": array(*keys.shape, dtype="float32"),
    }
    beta = array(batch, heads, count, 1, form.chunk, dtype="float32") if form.delta else None
    runs = array(batch, count, 1, form.chunk, dtype="float32") if way in ("forward", "backward") else None
    sequence = array(count, dtype="int32") if packed else None
    stored = str(form.stored)
    saved = {"states": array(batch, heads, count, size, size, dtype=stored)}
    if form.delta:
        saved["inverses"] = array(batch, heads, length, form.chunk, dtype=stored)
    return Operands(sequence, keys, keys, keys, gates[form.decay], beta, runs, state), saved, keys, state


def compile_all(targets: list[str], dtypes: list[str], forms: list[str], wanted: list[str], dump: Path) -> Counts:
    """Bundles of every kernel by target. Raises what the compiler raises."""
    import jax
    from jax.experimental import topologies

    from kernels.tpu import backward, forward
    from kernels.tpu.layout import Form

    found: Counts = {}
    for name in targets:
        topology, size = TARGETS[name]
        device = topologies.get_topology_desc(topology, platform="tpu").devices[0]
        found[name] = {}
        for decay, delta, dtype in kinds(name):
            heads = heads_of(decay, delta, dtype, size)
            form = Form(decay, delta, size**-0.5, CHUNK, heads, dtype == "float32", None)
            if dtype not in dtypes or (forms and form.name not in forms):
                continue
            for way in (way for way in ways(name) if way in wanted):
                kernel = "backward" if way.endswith("backward") else "forward"
                given, saved, do, state = operands(form, way, dtype, size, device)
                shutil.rmtree(dump, ignore_errors=True)
                dump.mkdir(parents=True)
                if kernel == "backward":
                    lowered = jax.jit(functools.partial(backward.call, form)).lower(given, saved, do, state)
                else:
                    lowered = jax.jit(functools.partial(forward.call, form, save=way != "inference")).lower(given)
                lowered.compile()
                key = f"{form.name} {way} {dtype}"
                found[name][key] = bundles(dump, f"{form.name}_{kernel}")
                print(f"{name:9} {key:50} {found[name][key]:6} bundles, {heads} heads a step", flush=True)
    return found


def bundles(dump: Path, kernel: str) -> int:
    """Scheduled bundles of a kernel, from the compiler's dump."""
    for path in dump.glob(f"*{kernel}*schedule-analysis_final_bundles.txt"):
        count = re.search(r"total scheduled bundles\D*(\d+)", path.read_text())
        if count:
            return int(count[1])
    raise SystemExit(f"error: the compiler left no bundle count of {kernel} in {dump}")


def grown(found: Counts, before: Counts) -> list[str]:
    """Sentences about counts that are larger than recorded."""
    return [
        f"{target}: {key} has {count} bundles, was {before[target][key]}"
        for target, counts in found.items()
        for key, count in counts.items()
        if count > before.get(target, {}).get(key, count)
    ]


def known(record: dict[str, Any]) -> Counts:
    """The last count of every kernel by target, of these sources or of earlier ones: what new counts are compared with."""
    earlier, bundles = (record.get(name, {}) for name in ("earlier", "bundles"))
    return {name: earlier.get(name, {}) | bundles.get(name, {}) for name in TARGETS if name in earlier or name in bundles}


def merged(found: Counts, record: dict[str, Any], source: str, versions: dict[str, str]) -> dict[str, Counts]:
    """The counts of a new record: `bundles`, compiled now or held by a record of the same sources and versions; and `earlier`,
    where there are any, of kernels not compiled since sources or versions changed. Targets in their order.
    """
    same = record.get("source") == source and record.get("versions") == versions
    before = record["bundles"] if same else {}
    bundles = {name: before.get(name, {}) | found.get(name, {}) for name in TARGETS if name in found or name in before}
    earlier = {
        name: {key: count for key, count in counts.items() if key not in bundles.get(name, {})}
        for name, counts in known(record).items()
    }
    earlier = {name: counts for name, counts in earlier.items() if counts}
    return {"bundles": bundles} | ({"earlier": earlier} if earlier else {})


def main(argv: list[str] | None = None) -> None:
    """Compile, compare, record."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    made.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    made.add_argument("--forms", nargs="+", default=[], help="names of forms, as scalar_decay_additive; all unless given")
    made.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    made.add_argument("--write", action="store_true", help="record the counts")
    made.add_argument("--allow_growth", action="store_true", help="record counts that grew, too")
    options = made.parse_args(argv)
    record = recorded()
    if record.get("source") == source_hash() and not options.write:
        print("unchanged since it was compiled")
        return
    dump = Path(tempfile.mkdtemp()) / "llo"
    # Read once, when libtpu starts: before JAX is imported.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}
    os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
    found = compile_all(options.targets, options.dtypes, options.forms, options.ways, dump)
    shutil.rmtree(dump.parent)
    worse = grown(found, known(record))
    print("\n".join(worse))
    if options.write and (options.allow_growth or not worse):
        versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
        counts = merged(found, record, source_hash(), versions)
        sizes = {name: target.size for name, target in TARGETS.items()}
        record = {"source": source_hash(), "versions": versions, "shape": SHAPE | {"size": sizes}} | counts
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        print(f"written to {RECORD}")
    elif worse:
        sys.exit(1)


if __name__ == "__main__":
    main()
