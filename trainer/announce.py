"""What a run says when it starts and when it ends."""

from __future__ import annotations

import lzma
import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from strata import ConfigError, implementation
from trainer.data.corpus import skip_words
from trainer.evaluate import describe
from trainer.flops import FORMULA
from trainer.metrics.throughput import peak_flops
from trainer.options import Config
from trainer.sampling import Sampling, generate

if TYPE_CHECKING:
    from trainer.loop import Loop

LONGEST_TEXT_FOR_XZ = 64 * 2**20


def announce(loop: Loop, state: Any, done: int) -> None:
    """Say what is about to be trained, on what, how, and where it will be found."""
    say, setup, config = loop.reporter.say, loop.setup, loop.config
    devices = setup.mesh.devices
    say(f"run        {loop.directory.path}")
    say(f"data       {data_line(setup.dataset.description)}")
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state["params"]))
    flops = loop.reporter.flops
    say(
        f"model      {count:,} parameters; {flops.per_token / 1e6:.2f} MFLOP a token "
        f"({flops.per_token_full / 1e6:.2f} without the causal half): {FORMULA}"
    )
    for line in mixer_lines(config, setup.mesh):
        say(f"mixer      {line}")
    if config.train.teacher.run:
        say(f"teacher    {config.train.teacher.run}, weight {config.train.teacher.weight:g}")
    shape = " x ".join(f"{axis} {size}" for axis, size in setup.mesh.shape.items())
    device = devices.flat[0]
    peak = peak_flops(device.device_kind, config.train.precision)
    speed = f"{peak / 1e12:.0f} TFLOP/s dense peak" if peak else "peak unknown, MFU n/a"
    say(f"devices    {devices.size} x {device.device_kind} ({shape}), {speed}, {config.train.precision}")
    if setup.dataset.optimum is not None:
        say(f"optimum    {setup.dataset.optimum:.6f} nats per scored token is the lowest expected loss of any model")
    for note in loop.notes:
        say(f"note       {note}")
    if done:
        say(f"resuming   after step {done:,} of {config.train.steps:,}")
    else:
        say(f"training   {config.train.steps:,} steps of {config.data.batch_size} x {config.data.sequence_length} tokens")


def mixer_lines(config: Config, mesh: jax.sharding.Mesh) -> list[str]:
    """How each kind of mixer is computed on this mesh, and why. Raises `ConfigError` if it cannot as asked."""
    kinds = {layer.mixer: layer for layer in config.model.plan()}
    dtype, length = jnp.dtype(config.train.precision), config.data.sequence_length
    batch = config.data.batch_size // config.train.accumulation
    with jax.set_mesh(mesh):
        found = [
            implementation(mixer).explain(mixer, layer, dtype, length, batch)
            for mixer, layer in kinds.items()
            if hasattr(implementation(mixer), "explain")  # one with a single way to be computed has nothing to say
        ]
    return list(dict.fromkeys(found))


def data_line(description: dict[str, Any]) -> str:
    """A data set's description in one line: what it is, how much of it there is, its fingerprint."""
    words = [str(description["kind"])]
    for name, value in description.items():
        if name in ("train", "validation") and "sequences" in value:  # synthetic: rows, not documents
            words.append(f"{name} {value['sequences']:,} sequences, {value['tokens']:,} scored tokens")
        elif name in ("train", "validation"):
            words.append(f"{name} {value['documents']:,} documents, {value['bytes'] / 1e6:.2f} MB")
        elif name == "sources":
            words += [f"[{data_line(source)}]" for source in value]
        elif name == "fingerprint":
            words.append(f"fingerprint {value[:12]}")
        elif name == "skipped_files" and (skipped := skip_words(value)):
            words.append(skipped)
        elif name == "empty_documents" and value:
            words.append(f"{value} empty")
        elif name in ("which", "python", "split", "tokenizer"):
            words.append(f"{name} {value}")
        elif isinstance(value, float):
            words.append(f"{name.replace('_', ' ')} {value:.6g}")
    return "; ".join(words)


def conclude(loop: Loop, state: Any, evaluation: dict[str, float]) -> None:
    """Say the result, compare it with a compressor, sample text, and say where everything is."""
    reporter, setup, directory = loop.reporter, loop.setup, loop.directory
    if reporter.console is not None:
        reporter.console.close()
    sample = _sample(loop, state)
    if jax.process_index() != 0:
        return
    print(f"\nheld-out data: {describe(evaluation)}")
    limit, size = loop.config.evaluate.final_batches, loop.config.evaluate.batch_size or loop.config.data.batch_size
    whole = limit is None or limit * size >= len(setup.dataset.held_out)
    # A compressor is given all of it, which compares with nothing where the model was scored on a part.
    scored = setup.dataset.validation_bytes if whole else None
    if setup.dataset.raw is not None and scored is not None and scored <= LONGEST_TEXT_FOR_XZ:
        raw = setup.dataset.raw_validation()
        if raw:
            packed = len(lzma.compress(raw, preset=9))
            print(f"xz -9 needs {8 * packed / len(raw):.4f} bits per byte for the same {len(raw):,} bytes as one stream")
    if sample is not None:
        print(f"\nsample:\n{_printable(sample)}\n")
    path = _shortest(directory.path)
    print(f"run directory  {path}")
    print(f"  metrics      {path / 'metrics.jsonl'}")
    steps = loop.checkpointer.steps()
    print(f"  checkpoints  {path / 'checkpoints'}: steps {', '.join(map(str, steps))}")
    named = {step: name for step, name in loop.config.milestones.items() if step in steps}
    if named:
        print(f"  by name      {', '.join(_named(loop, step, name) for step, name in named.items())}: --step takes a name")
    print(f"  evaluate     python -m trainer.evaluate --run {shlex.quote(str(path))}")
    if setup.tokenizer is not None:
        print(f"  generate     python -m trainer.generate --run {shlex.quote(str(path))} --prompt 'def '")
    print(f"  run again    python -m trainer --config {shlex.quote(str(path / 'config.json'))} --workdir ANOTHER")


def _named(loop: Loop, step: int, name: str) -> str:
    """A named checkpoint, with its validation loss where it was saved with one."""
    metric = loop.checkpointer.metric(step)
    return f"{name} (step {step}" + (")" if metric is None else f", loss {metric:.4f})")


def _sample(loop: Loop, state: Any) -> str | None:
    """Text drawn from the trained model; None where there is none to draw."""
    setup, config = loop.setup, loop.config
    tokenizer = setup.dataset.tokenizer
    # Several processes hold parts of the parameters only; `trainer.generate` samples from the checkpoint instead.
    if tokenizer is None or not config.log.sample_tokens or jax.process_count() > 1:
        return None
    prompt = [tokenizer.separator, *tokenizer.encode(config.log.sample).tolist()]
    count = min(config.log.sample_tokens, config.data.sequence_length - len(prompt))
    if count < 1:
        return None
    model = nnx.merge(setup.graph, nnx.State(state["params"]))
    how = {"sampling": Sampling(temperature=0.8), "seed": config.seed, "banned": [tokenizer.separator]}
    try:
        tokens = generate(model, [prompt], count, **how)
    except ConfigError as error:  # the run has trained and is saved
        print(f"no sample: {error}")
        return None
    return config.log.sample + tokenizer.decode(tokens[0])


def _printable(text: str) -> str:
    """With a mark in place of what standard output cannot show."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def _shortest(path: Path) -> Path:
    """Relative to the current directory where it lies below it."""
    try:
        return path.relative_to(Path.cwd())
    except (ValueError, OSError):  # OSError: the current directory is gone
        return path
