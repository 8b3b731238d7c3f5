"""Linear attention on a TPU, without one: scheduled instruction bundles of the Pallas kernels and of the plain-JAX form.

    pip install libtpu
    python -m benchmarks.tpu_bundles                            # v5e, v6e and TPU7x, bfloat16, ten minutes each; a file each
    python -m benchmarks.tpu_bundles --targets v6e --ops gla

Both back-ends of an op, `tpu` and `xla`, are compiled whole by the real compiler for a device that is not there, forward and
forward + backward (the derivative at a cotangent of o), at B = 2, T = 16384, H = 16, K = V = 128. A bundle is what a TPU core
issues in one cycle at best. Every bundle is counted as often as it is issued: times the trips of its loop, and of the scan
around it; predicated regions as if always entered. But once are counted the last branch of a loop, what is issued behind it,
and loops within loops whose trips a program computes as it runs: short ones that begin copies or set memory to zero. Not
counted are the program that starts the others, and copies that the DMA engine makes alone. v5p is left out: two cores share its
programs' loops as they run, so that a dump does not say how often a core goes round.

Counts are no times. Waiting for memory is not in them, of which plain JAX, whose chunks' products and states pass through HBM,
has more to do: `temporary MiB` is the HBM that a compiled program takes beside its arguments and results.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import parser, show, write_result
from kernels.tpu.compiled import SHAPE, TOPOLOGIES
from kernels.tpu.limits import USUAL_SIZE
from trainer import command

OPS = ("linear_attention", "simple_gla", "gla", "delta_rule", "gated_delta_rule", "kda")
"""One of every form: no decay, one a head, one a channel; additive and by the delta rule."""
TARGETS = tuple(target for target in TOPOLOGIES if target != "v5p")
BACKENDS = ("tpu", "xla")
BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|0) +(?:([A-Z]{2}))?: *(>*) *\{(\})?")
"""A bundle in the compiler's dump: what begins at it (LB: the body of a loop), a `>` for every loop around it unless it is
empty, and whether it is.
"""
EXIT = re.compile(r"scmp\.ge\.s32\.totalorder %\w+, (\d+) /\* loop exit test")
LAUNCHED = ('"window_config":{', "tpu_custom_call")
"""Marks of instructions that are programs of their own; some have none."""


def issued(dump: str) -> int:
    """Bundles that a program issues, from its final bundles as the compiler dumps them.

    Raises:
      ValueError: the trips of an outermost loop are not in the dump.
    """
    counts, trips = [0], [1]  # of the program, and of each open loop: bundles a trip, trips

    def close(depth: int) -> None:
        while len(counts) > depth + 1:
            if not (times := trips.pop() or len(trips) > 1):
                raise ValueError("a loop in the dump does not say how often it is run")
            inner = counts.pop()
            counts[-1] += times * inner

    for line in dump.splitlines():
        if found := BUNDLE.match(line):
            # An empty bundle shows no depth; what is left of a loop's last branch stands behind its end, and is counted once.
            depth = len(counts) - 1 if found[3] else len(found[2])
            if found[1] == "LB":
                close(depth - 1)
                counts.append(0)
                trips.append(0)
            close(depth)
            counts[-1] += 1
            if test := EXIT.search(line):
                trips[-1] = int(test[1])
    close(0)
    return counts[0]


def executions(hlo: str, dumped: Collection[str] = ()) -> dict[str, tuple[int, str]]:
    """How often each program of a compiled module is run, by its instruction's name, and what it is, names left out. Programs
    are what was `dumped`, and what bears their marks: of those that are the same only one is.

    Raises:
      ValueError: a loop whose trips are not a constant in its condition.
    """
    bodies: dict[str, list[str]] = {}
    for block in re.split(r"\n(?=(?:ENTRY )?%[^\n]*-> [^\n]*\{\n)", hlo):
        if head := re.match(r"\s*(ENTRY )?%(\S+) ", block):
            bodies["ENTRY" if head[1] else head[2]] = block.splitlines()[1:]
    found: dict[str, tuple[int, str]] = {}

    def walk(body: str, times: int) -> None:
        for line in bodies[body]:
            if not (name := re.match(r"\s*(?:ROOT )?%(\S+) = ", line)):
                continue
            if loop := re.search(r" while\(.*condition=%([^\s,]+), body=%([^\s,]+)", line):
                bounds = re.findall(r" constant\((\d+)\)", "\n".join(bodies[loop[1]]))
                if len(bounds) != 1:
                    raise ValueError(f"no constant number of trips in {loop[1]}")
                walk(loop[2], times * int(bounds[0]))
            elif name[1] in dumped or any(mark in line for mark in LAUNCHED):
                inner = re.search(r"calls=%([^\s,]+)", line)
                found[name[1]] = (
                    times,
                    "\n".join(map(nameless, [line.replace("ROOT ", ""), *(bodies[inner[1]] if inner else ())])),
                )

    walk("ENTRY", 1)
    return found


def nameless(line: str) -> str:
    """An instruction without names and source lines: what is the same for two that do the same."""
    return re.sub(r"%[^\s,()]+|, metadata=\{[^}]*\}|, sharding=\{.*?\}(?=,|$)", "", line).strip()


def total(hlo: str, dumps: Path) -> dict[str, int]:
    """Issued bundles of a compiled module by program, the same programs added up: the compiler dumps one of them.

    Raises:
      SystemExit: a program of the module was not dumped.
    """
    files = {re.sub(r"^\d+-|-\d+-final_bundles\.txt$", "", path.name): path for path in dumps.glob("*-final_bundles.txt")}
    runs = executions(hlo, files)
    known = {what: issued(files[name].read_text()) for name, (_, what) in runs.items() if name in files}
    if missing := [name for name, (_, what) in runs.items() if what not in known]:
        raise SystemExit(f"error: the compiler left no bundles of {', '.join(missing)} in {dumps}")
    return {name: times * known[what] for name, (times, what) in runs.items()}


def compiled(op: str, backend: str, backward: bool, dtype: str, device: Any) -> Any:
    """The op on a device that need not be there, forward, or forward + backward of q, k, v and gates."""
    import jax

    import kernels
    from kernels.ops import GATES

    sharding = jax.sharding.SingleDeviceSharding(device)
    tokens = tuple(SHAPE.values())

    def array(*shape: int, dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def forward(*given: jax.Array) -> jax.Array:
        return getattr(kernels, op)(*given, backend=backend)[0]

    def both(do: jax.Array, *given: jax.Array) -> Any:
        o, pull = jax.vjp(forward, *given)
        return o, pull(do)

    decay, delta = GATES[op]
    qkv = array(*tokens, USUAL_SIZE, dtype=dtype)
    gates = {"none": [], "scalar": [array(*tokens, dtype="float32")], "vector": [array(*tokens, USUAL_SIZE, dtype="float32")]}
    given = [qkv] * 3 + gates[decay] + [array(*tokens, dtype="float32")] * delta
    with jax.default_device(device):
        return jax.jit(both if backward else forward).lower(*([qkv] if backward else []), *given).compile()


def main(argv: Sequence[str] | None = None) -> None:
    """Compile, count, show, write."""
    made = parser(__doc__)
    made.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    made.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    made.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    options = made.parse_args(argv)
    if importlib.util.find_spec("libtpu") is None:
        raise SystemExit("error: the compiler is not installed: pip install libtpu")
    dumps = Path(tempfile.mkdtemp()) / "llo"
    # Read once, when libtpu starts: before JAX is imported.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}
    # Only the last passes: the text of all of them takes longer than compiling.
    wanted = "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
    os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dumps} {wanted}"
    from jax.experimental import topologies

    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    shape = SHAPE | {"key_size": USUAL_SIZE, "value_size": USUAL_SIZE}
    shown = []
    for target in options.targets:
        rows: list[dict[str, Any]] = []
        device = topologies.get_topology_desc(TOPOLOGIES[target], platform="tpu").devices[0]
        for op in options.ops:
            for backward in (False, True):
                row: dict[str, Any] = {"op": op, "way": "forward + backward" if backward else "forward"}
                for backend in BACKENDS:
                    shutil.rmtree(dumps, ignore_errors=True)
                    dumps.mkdir(parents=True)
                    program = compiled(op, backend, backward, options.dtype, device)
                    bundles = total(program.as_text(), dumps)
                    temporary = program.memory_analysis().temp_size_in_bytes
                    row[backend] = {"bundles": sum(bundles.values()), "temporary_bytes": temporary, "programs": bundles}
                row["tpu_over_xla"] = row["tpu"]["bundles"] / row["xla"]["bundles"]
                rows.append(row)
                print(f"{target} {op} {row['way']}: {row['tpu_over_xla']:.3f}", flush=True)
        result = {"target": target, "versions": versions, "shape": shape, "dtype": options.dtype, "rows": rows}
        write_result(f"tpu_bundles-{target.lower()}-{options.dtype}", result, options.out)
        shown += [
            (target, row["op"], row["way"])
            + tuple(f"{row[backend]['bundles'] / 1e6:.2f}" for backend in BACKENDS)
            + (f"{row['tpu_over_xla']:.3f}",)
            + tuple(f"{row[backend]['temporary_bytes'] / 2**20:.0f}" for backend in BACKENDS)
            for row in rows
        ]
    shutil.rmtree(dumps.parent)
    columns = ("target", "op", "way", "M bundles, tpu", "xla", "ratio", "temporary MiB, tpu", "xla")
    show(f"Scheduled bundles as often as they are issued, {options.dtype}; no times", columns, shown)


if __name__ == "__main__":
    command.run(main)
