"""What a run says: what it trains on and how when it starts; how it compares with a compressor, and a sample, when it ends."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import lzma
import math
import re

import jax
import numpy as np
import pytest

import trainer
from trainer import config as configuration
from trainer.announce import mixer_lines
from trainer.data.bigram import draw_chain
from trainer.data.options import Bigram
from trainer.data.tokenizer import train_bpe
from trainer.metrics import read_metrics
from trainer.setup import make_mesh

TRAINING = ["the cat sat on the mat and the dog sat on the log. " * 4, "a mat, a cat, a dog; a log. " * 5]
HELD_OUT = ["the dog sat on a mat; the cat sat on the dog. " * 3, "a log, a dog, a cat and the mat. " * 4]
LENGTH, BATCH, WIDTH, LAYERS, VOCABULARY = 24, 4, 32, 2, 280


def train(config, directory):
    """Train; returns what was printed on standard output and on standard error."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        trainer.train(config, directory)
    return out.getvalue(), err.getvalue()


def line(said, name):
    """The one line of the start that begins with a name."""
    (found,) = [line for line in said.splitlines() if line.startswith(f"{name} ")]
    return found.removeprefix(name).strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("announce")


@pytest.fixture(scope="module")
def text(folder):
    """A run on text whose tokens are of several bytes: what it printed at the end, and at the start."""
    for kind, documents in (("txt", TRAINING), ("md", HELD_OUT)):
        for number, document in enumerate(documents):
            (folder / f"{number}.{kind}").write_text(document)
    train_bpe(TRAINING, VOCABULARY, folder / "tokenizer.json")
    config = {
        "data": {
            "name": "text_files",
            "files": [str(folder / "*.txt")],
            "validation_files": [str(folder / "*.md")],
            "tokenizer": str(folder / "tokenizer.json"),
            "sequence_length": LENGTH,
            "batch_size": BATCH,
        },
        "model": {"width": WIDTH, "layers": LAYERS, "heads": 2},
        "train": {"steps": 3},
        "evaluate": {"every": 0},
        "checkpoint": {"every": 0},
        "log": {"every": 1, "sample": "the ", "sample_tokens": 8},
    }
    return train(config, folder / "text")


@pytest.fixture(scope="module")
def opened(text, folder):
    return trainer.load(folder / "text")


def test_xz_is_given_the_held_out_bytes_as_one_stream(text):
    raw = "".join(HELD_OUT).encode()
    bits = 8 * len(lzma.compress(raw, preset=9)) / len(raw)
    assert f"xz -9 needs {bits:.4f} bits per byte for the same {len(raw):,} bytes as one stream" in text[0].splitlines()


def test_xz_is_left_out_where_a_part_of_the_held_out_data_was_scored(text, folder):
    config = json.loads((folder / "text" / "config.json").read_text())
    batches = len(trainer.load(folder / "text").setup.dataset.held_out)
    for scored in (batches - 1, batches):
        config["evaluate"] |= {"final_batches": scored, "batch_size": 1}
        said, _ = train(config, folder / f"batches{scored}")
        assert ("xz -9" in said) == (scored == batches)


def test_a_sample_goes_on_from_the_prompt(text):
    _, _, after = text[0].partition("\nsample:\n")
    sample, _, _ = after.partition("\n\nrun directory")
    assert sample.startswith("the ") and len(sample) > len("the ")


def test_bits_per_byte_of_a_row_is_loss_over_ln_2_and_bytes_per_token(opened, folder):
    dataset = opened.setup.dataset
    sizes = np.array([len(dataset.tokenizer.decode_bytes([token])) for token in range(dataset.vocab_size)])
    rows = [row for row in read_metrics(folder / "text" / "metrics.jsonl") if row["split"] == "train"]
    with contextlib.closing(dataset.train()) as batches:
        for row, batch in zip(rows, itertools.islice(batches, 3), strict=True):
            per_token = sizes[batch["targets"][batch["weights"] > 0]].mean()
            assert per_token > 1.2, "bits per byte must not be bits per token here"
            assert row["bpb"] == pytest.approx(row["loss"] / math.log(2) / per_token, rel=1e-6)


def test_the_start_says_what_it_trains_on(text, opened):
    found = line(text[1], "data")
    size = sum(map(len, TRAINING))
    assert found.startswith("text_files") and f"train 2 documents, {size / 1e6:.2f} MB" in found
    assert f"fingerprint {opened.setup.dataset.description['fingerprint'][:12]}" in found


def test_the_start_says_how_every_kind_of_mixer_is_computed_and_why(text, tiny):
    assert re.fullmatch(r"attention: \w+ \(.+\)", line(text[1], "mixer"))
    mixers = [{"name": name} for name in ("attention", "gated_delta_net", "attention")]
    config = configuration.resolve_config(tiny(model__mixer={"name": "hybrid", "pattern": mixers}, model__layers=3))
    attention, linear = mixer_lines(config, make_mesh(config))
    assert attention == line(text[1], "mixer")
    assert re.fullmatch(r"gated_delta_net: \w+ \(.+\)", linear)


def test_the_start_says_what_a_token_costs_and_by_which_formula(text, opened):
    sizes = {jax.tree_util.keystr(path): leaf.size for path, leaf in jax.tree.leaves_with_path(opened.params)}
    products = 6 * sum(size for name, size in sizes.items() if "kernel" in name)
    scores = 12 * WIDTH * LENGTH * LAYERS
    assert line(text[1], "model") == (
        f"{sum(sizes.values()):,} parameters; {(products + scores / 2) / 1e6:.2f} MFLOP a token "
        f"({(products + scores) / 1e6:.2f} without the causal half): 6 x matrix parameters a use + "
        "mixers (attention: 12 x heads x head size x positions, halved: causal)"
    )


def test_a_bigram_run_says_its_entropy_rate_and_compresses_and_samples_nothing(tiny, folder):
    out, err = train(tiny(train__steps=2, evaluate__every=0), folder / "bigram")
    transitions = draw_chain(Bigram(vocabulary=12)).matrix()
    share = np.linalg.matrix_power(transitions, 4096)[0]
    nats = -float((share[:, None] * transitions * np.log(np.where(transitions > 0, transitions, 1))).sum())
    assert line(err, "optimum").startswith(f"{nats:.6f} nats per scored token")
    assert f"entropy rate nats per token {nats:.6g}; entropy rate bits per token {nats / math.log(2):.6g}" in line(err, "data")
    assert "xz" not in out and "sample" not in out
