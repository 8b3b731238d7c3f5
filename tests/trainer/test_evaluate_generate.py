"""Evaluation says what the run said, bits per byte are what they are called, and sampling draws what it was asked to."""

from __future__ import annotations

import json
import math
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trainer
from models import options
from strata import ConfigError, StrataError
from trainer import evaluate as evaluation
from trainer import generate as generation
from trainer.averaging import weights_of
from trainer.metrics import read_metrics
from trainer.sampling import Sampling, draw, generate

LENGTH = 24
TRAINING = [b"the cat sat on the mat and the dog sat on the log. " * 4, b"a mat, a cat, a dog; a log. " * 5]
HELD_OUT = ["XYZZY, PLUGH: 12345!", "Ünïcödé ÄÖÜ 0123456789 ABCDEFGHIJKLMNOPQRSTUVWXYZ", "", "Q", "(7)" * 19]
SEPARATOR = 256


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on text whose held-out text is of another kind, so that its loss rises: the best step is an early one."""
    directory = tmp_path_factory.mktemp("evaluate")
    for number, document in enumerate(TRAINING):
        (directory / f"{number}.txt").write_bytes(document)
    for number, text in enumerate(HELD_OUT):
        (directory / f"{number}.md").write_text(text)
    config = {
        "data": {
            "name": "text_files",
            "files": [str(directory / "*.txt")],
            "validation_files": [str(directory / "*.md")],
            "sequence_length": LENGTH,
            "batch_size": 4,
        },
        "model": {"width": 32, "layers": 2, "heads": 2, "kv_heads": 1},
        "optimizer": {"direction": {"learning_rate": 1e-2}, "schedule": {"name": "constant"}},
        "train": {"steps": 80},
        "evaluate": {"every": 20, "batches": 1000},
        "checkpoint": {"every": 20, "keep_latest": 9},
        "log": {"every": 1, "sample": "the "},
    }
    trainer.train(config, directory / "run")
    return directory / "run"


@pytest.fixture(scope="module")
def opened(run):
    return trainer.load(run)


def validation_rows(run) -> dict[int, dict]:
    return {row["step"]: row for row in read_metrics(run / "metrics.jsonl") if row["split"] == "val"}


def evaluated(capsys, run, *arguments: object) -> dict:
    assert evaluation.main(["--run", str(run), *map(str, arguments)]) == 0
    words, numbers = capsys.readouterr().out.strip().splitlines()[-2:]
    found = json.loads(numbers)
    by = f" by {found['depth']['name']}.*" if "depth" in found else ""
    assert re.search(f"step {found['step']}{by}: loss {found['loss']:.4f} nats/token", words)
    return found


def generated(capsys, run, *arguments: object) -> str:
    assert generation.main(["--run", str(run), *map(str, arguments)]) == 0
    return capsys.readouterr().out


# ---- evaluate


@pytest.mark.parametrize("arguments", [[], ["--step", "latest"], ["--step", 80], ["--step", 40], ["--step", "best"]])
def test_evaluating_a_checkpoint_gives_the_row_of_its_step(run, capsys, arguments):
    expected = validation_rows(run)
    best = min(expected, key=lambda step: expected[step]["loss"])
    assert best != 80, "the latest must not be the best here, or the two are not told apart"
    found = evaluated(capsys, run, *arguments)
    assert found["step"] == {"best": best, 40: 40}.get(arguments[-1] if arguments else None, 80)
    row = expected[found["step"]]
    assert found["tokens"] == row["tokens"]
    for name in ("loss", "perplexity", "bpb"):
        assert found[name] == pytest.approx(row[name], rel=1e-6), name


def test_bits_per_byte_is_the_information_in_the_raw_bytes_by_hand(run, opened, capsys):
    documents = [text.encode() for text in HELD_OUT if text]
    stream = np.concatenate([[SEPARATOR, *document] for document in documents])
    assert (len(stream) - 1) % LENGTH, "the last window must be a partial one, or it is not tested"
    nats, scored = 0.0, 0
    for start in range(0, len(stream) - 1, LENGTH):
        window = stream[start : start + LENGTH + 1]
        tokens, targets = window[:-1], window[1:]
        segments = np.cumsum(tokens == SEPARATOR) + 1
        logits = opened.model(jnp.asarray(tokens[None], jnp.int32), segment_ids=jnp.asarray(segments[None], jnp.int32))
        chosen = np.asarray(jax.nn.log_softmax(logits[0].astype(jnp.float32)))[np.arange(len(targets)), targets]
        nats -= float(chosen[targets != SEPARATOR].sum(dtype=np.float64))
        scored += int((targets != SEPARATOR).sum())
    assert scored == sum(map(len, documents))  # every byte of every document once, no separator
    found = evaluated(capsys, run)
    assert found["tokens"] == scored
    assert found["bpb"] == pytest.approx(nats / math.log(2) / sum(map(len, documents)), rel=1e-5)
    assert found["loss"] == pytest.approx(nats / scored, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / scored), rel=1e-4)


def test_accuracy_on_recall_is_the_share_of_answers_guessed_right(tiny, tmp_path, capsys):
    data = {"name": "recall", "sequence_length": 16, "batch_size": 4, "vocabulary": 5, "pairs": 2, "validation_examples": 30}
    trainer.train(tiny(data=data, train__steps=5), tmp_path / "run")
    opened, right, scored = trainer.load(tmp_path / "run"), 0, 0
    for batch in opened.setup.dataset.validation(30):
        logits = opened.model(jnp.asarray(batch["tokens"]), segment_ids=jnp.asarray(batch["segment_ids"]))
        asked = batch["weights"] > 0
        right += int((np.asarray(logits).argmax(-1) == batch["targets"])[asked].sum())
        scored += int(asked.sum())
    assert scored == 30 * 2 and 0 < right < scored
    found = evaluated(capsys, tmp_path / "run")
    assert found["tokens"] == scored and found["accuracy"] == pytest.approx(right / scored)
    assert "bpb" not in found


def test_fewer_batches_are_fewer_rows_of_the_same_text(run, capsys):
    some = evaluated(capsys, run, "--batches", 1)
    assert 0 < some["tokens"] < validation_rows(run)[80]["tokens"]
    assert evaluated(capsys, run, "--batches", 999)["loss"] == pytest.approx(validation_rows(run)[80]["loss"], rel=1e-6)


@pytest.mark.parametrize(("depth", "unroll"), [("sequential", None), ('{"name": "sequential", "unroll": false}', False)])
def test_another_way_to_run_the_same_weights_gives_the_same_numbers_and_text(run, capsys, depth, unroll):
    found = evaluated(capsys, run, "--depth", depth)
    assert found["loss"] == pytest.approx(validation_rows(run)[80]["loss"], rel=1e-6)
    assert found["depth"] == {"name": "sequential", "unroll": unroll}
    asked = ["--prompt", "the ", "--tokens", 12, "--temperature", 0]
    assert generated(capsys, run, *asked, "--depth", depth) == generated(capsys, run, *asked)


def test_a_depth_is_described_by_what_is_not_usual_of_it():
    asked = options.LayerParallelDepth(layers=4, start="batched")
    assert evaluation.describe_depth(asked) == "layer_parallel layers=4 start=batched"


def test_a_draft_is_no_longer_than_the_text(run, capsys):
    asked = ["--run", str(run), "--tokens", "3", "--draft", "sequential", "--draft_tokens", "999999999"]
    assert generation.main(asked) == 0
    assert "tokens accepted" in capsys.readouterr().err


def test_the_length_of_a_draft_needs_a_draft(run):
    with pytest.raises(ConfigError, match="--draft_tokens is the length of a draft: give --draft too"):
        generation.main(["--run", str(run), "--draft_tokens", "3"])


def test_an_error_in_a_draft_names_its_flag(run):
    with pytest.raises(ConfigError, match=r"1 problem in --draft:\n *--draft.layers = 9\n"):
        generation.main(["--run", str(run), "--tokens", "2", "--draft", '{"name": "layer_parallel", "layers": 9}'])


def test_an_average_of_checkpoints_is_evaluated_and_the_run_left_alone(run, opened, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 3, *(trainer.load(run, step).params for step in (40, 60, 80)))
    with jax.set_mesh(opened.setup.mesh):
        of_three = evaluation.evaluate(opened.setup, mean, opened.setup.jitted_evaluation_step(), None)["loss"]
    newest = validation_rows(run)[80]["loss"]
    for form, steps, loss in (
        ("lawa:1", [80], newest),
        ("lawa:3", [40, 60, 80], of_three),
        ("wsm:3", [40, 60, 80], of_three),
        ("cma:2:1.0", [60, 80], newest),
    ):
        assert evaluation.main(["--run", str(run), "--average", form]) == 0
        words, numbers = capsys.readouterr().out.strip().splitlines()[-2:]
        found = json.loads(numbers)
        assert found["steps"] == steps and f"{form} of steps {', '.join(map(str, steps))}: loss" in words
        assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert of_three != pytest.approx(newest, rel=1e-3)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_the_weights_of_an_average_in_words():
    np.testing.assert_allclose(weights_of("lawa:4"), [0.25] * 4)
    np.testing.assert_allclose(weights_of("cma:3"), [0.64, 0.16, 0.2])
    np.testing.assert_allclose(weights_of("wsm:2:cosine"), [0.5, 0.5])
    np.testing.assert_allclose(weights_of("wsm:4:square"), [1 - 9 / 16, 5 / 16, 3 / 16, 1 / 16])
    np.testing.assert_allclose(weights_of("wsm:1:sqrt"), [1])


def test_checkpoints_that_are_not_evenly_spaced_are_averaged_with_a_note(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "40")
    assert evaluation.main(["--run", str(tmp_path / "run"), "--average", "lawa:3", "--batches", "1"]) == 0
    assert "note: the checkpoints of steps 20, 60, 80 are not evenly spaced" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--step", "30"], r"has no checkpoint 30\. Good steps here: 20, 40, 60, 80; names: best, latest\.$"),
        (["--step", "newest"], r"no checkpoint named 'newest'\. Good steps here: 20, 40, 60, 80; names: best, latest\.$"),
        (["--average", "lawa:5"], "of 5 checkpoints: .* has 4, of steps 20, 40, 60, 80; checkpoint.keep_latest"),
        (["--average", "ema:5"], "expected lawa:COUNT, cma:COUNT.:ALPHA., wsm:COUNT.:SHAPE.$"),
        (["--average", "lawa"], "expected lawa:COUNT"),
        (["--average", "lawa:2:3"], "expected lawa:COUNT"),
        (["--average", "wsm:99999999999"], "COUNT from 1 to 10,000, not '99999999999'"),
        (["--average", "lawa:0"], "COUNT from 1 to 10,000, not '0'"),
        (["--average", "cma:3:2"], "ALPHA above 0 and at most 1, not '2'"),
        (["--average", "cma:3:x"], "ALPHA above 0 and at most 1, not 'x'"),
        (["--average", "wsm:3:inverse"], "SHAPE among linear, sqrt, cosine, square, not 'inverse'"),
        (["--average", "lawa:2", "--step", "40"], "--average takes the newest checkpoints; leave out --step"),
        (["--depth", "{"], "is not JSON"),
        (["--depth", "upwards"], "'upwards' is not JSON .*, nor one of .*sequential"),
        (["--depth", '{"name": "layer_parallel", "layers": 9}'], r"1 problem in --depth:\n *--depth.layers = 9\n"),
        (["--depth", "3"], "expected a dict with a name"),
        (["--depth", '{"name": "upwards"}'], "registered are"),
        (["--depth", '{"name": "sequential", "unrol": true}'], "did you mean"),
    ],
)
def test_what_cannot_be_evaluated_is_said(run, arguments, words):
    with pytest.raises(StrataError, match=words) as error:
        evaluation.main(["--run", str(run), *arguments])
    assert error.value.exit_code == 2 and (arguments[0] == "--depth" or "\n" not in str(error.value))


@pytest.mark.parametrize(
    ("main", "arguments", "words"),
    [
        (evaluation.main, ["--batches", "0"], "--batches: expected a whole number from 1 to 2,147,483,647, not '0'"),
        (evaluation.main, ["--batches", "1.5"], "--batches: expected a whole number from 1 to 2,147,483,647, not '1.5'"),
        (generation.main, ["--context", "0"], "--context: expected a whole number from 1 to 2,147,483,647, not '0'"),
        (generation.main, ["--tokens", "0"], "--tokens: expected a whole number from 1 to 2,147,483,647, not '0'"),
        (generation.main, ["--tokens", "9" * 20], "--tokens: expected a whole number from 1 to 2,147,483,647, not '999"),
        (generation.main, ["--top_k", "0"], "--top_k: expected a whole number from 1 to 2,147,483,647, not '0'"),
        (generation.main, ["--top_k", "²"], "--top_k: expected a whole number from 1 to 2,147,483,647, not '²'"),
        (generation.main, ["--seed", str(2**31)], "--seed: expected a whole number from 0 to 2,147,483,647, not '2147483648'"),
    ],
)
def test_a_flag_with_a_wrong_value_ends_with_2(run, capsys, main, arguments, words):
    with pytest.raises(SystemExit) as ended:
        main(["--run", str(run), *arguments])
    assert ended.value.code == 2 and words in capsys.readouterr().err


# ---- generate


PROMPTS = [[SEPARATOR, *b"the cat"], [SEPARATOR], [SEPARATOR, *b"a mat, a"], [SEPARATOR, *b"the dog sat on the "]]


def test_greedy_text_is_the_most_likely_token_of_the_full_forward_every_time(opened):
    for prompt in PROMPTS:
        row = generate(opened.model, [prompt], 12, sampling=Sampling(temperature=0))[0]
        logits = np.asarray(opened.model(jnp.asarray([[*prompt, *row[:-1]]], jnp.int32)))[0, len(prompt) - 1 :]
        assert logits.shape == (12, 257)
        # Not argmax itself: two programs may round a tie to either side.
        assert (logits[np.arange(12), row] > logits.max(-1) - 1e-4).all()


def test_with_64_bit_types_enabled_the_same_tokens_are_drawn(opened):
    asked = {"sampling": Sampling(temperature=0)}
    expected = generate(opened.model, PROMPTS, 6, **asked)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(generate(opened.model, PROMPTS, 6, **asked), expected)


def test_prompts_of_different_lengths_do_not_see_each_other_or_the_padding(opened):
    together = generate(opened.model, PROMPTS, 10, sampling=Sampling(temperature=0))
    for prompt, row in zip(PROMPTS, together, strict=True):
        np.testing.assert_array_equal(generate(opened.model, [prompt], 10, sampling=Sampling(temperature=0))[0], row)
    assert len({tuple(row) for row in together}) > 1


def test_the_same_seed_gives_the_same_text_and_another_seed_another(run, capsys):
    asked = ["--prompt", "the ", "--tokens", 16, "--temperature", 1]
    first = generated(capsys, run, *asked, "--seed", 5)
    assert generated(capsys, run, *asked, "--seed", 5) == first
    assert generated(capsys, run, *asked, "--seed", 6) != first
    assert first.startswith("the ")


def test_several_prompts_are_printed_in_order_with_their_text(run, capsys):
    out = generated(capsys, run, "--prompt", "the cat", "--prompt", "a mat", "--tokens", 8, "--temperature", 0)
    assert out.splitlines()[0].startswith("the cat") and out.splitlines()[-1].startswith("a mat")
    assert generated(capsys, run, "--tokens", 8).strip()  # no prompt: from a separator on


def test_a_banned_token_is_never_drawn_and_would_have_been(opened):
    prompts = [[SEPARATOR]] * 64
    asked = {"sampling": Sampling(temperature=50.0), "seed": 3}
    assert SEPARATOR in generate(opened.model, prompts, 20, **asked)
    assert SEPARATOR not in generate(opened.model, prompts, 20, banned=[SEPARATOR], **asked)


def test_a_prompt_longer_than_the_context_is_refused_unless_asked_for(run, capsys):
    asked = ["--run", str(run), "--prompt", "the cat sat on the mat", "--tokens", "4"]
    with pytest.raises(ConfigError, match="has 23 tokens with the separator, and 4 more would exceed the context of 24"):
        generation.main(asked)
    assert generation.main([*asked, "--context", "27"]) == 0
    assert capsys.readouterr().out.startswith("the cat sat on the mat")
    with pytest.raises(ConfigError, match="and 1 more would exceed the context of 24 .* shorten it, or give --context"):
        generation.main(["--run", str(run), "--prompt", "the cat sat on the mat."])


def test_without_a_number_of_tokens_the_context_is_filled_after_the_longest_prompt(run, monkeypatch):
    counts = []

    def count_only(model, prompts, count, **how):
        counts.append(count)
        return [[]] * len(prompts)

    monkeypatch.setattr("trainer.sampling.generate", count_only)
    for arguments in (["--prompt", "def "], ["--prompt", "the cat", "--prompt", "a"], ["--context", "999"], ["--tokens", "3"]):
        assert generation.main(["--run", str(run), *arguments]) == 0
    assert counts == [LENGTH - 5, LENGTH - 8, 200, 3]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--temperature", "-1"], "temperature = -1.0: expected 0, or a number from 1e-30 to 1e.30"),
        (["--temperature", "nan"], "temperature = nan: expected 0, or a number from 1e-30 to 1e.30"),
        (["--temperature", "inf"], "temperature = inf: expected 0, or a number from 1e-30 to 1e.30"),
        (["--temperature", "1e-50"], "temperature = 1e-50: expected 0, or a number from 1e-30 to 1e.30"),
        (["--temperature", "1e38"], "temperature = 1e.38: expected 0, or a number from 1e-30 to 1e.30"),
        (["--prompt", "caf\udce9"], "prompt 'caf.*' holds bytes that are not UTF-8"),
        (["--top_p", "nan"], "top_p = nan: expected above 0, at most 1"),
        (["--top_p", "1.5"], "top_p = 1.5: expected above 0, at most 1"),
    ],
)
def test_what_cannot_be_drawn_is_said(run, arguments, words):
    with pytest.raises(ConfigError, match=words):
        generation.main(["--run", str(run), *arguments])


def test_data_that_is_not_text_has_nothing_to_prompt(tiny, tmp_path, capsys):
    trainer.train(tiny(train__steps=2), tmp_path / "run")
    printed = capsys.readouterr().out
    assert "trainer.evaluate" in printed and "trainer.generate" not in printed
    with pytest.raises(ConfigError, match="'bigram' is not text"):
        generation.main(["--run", str(tmp_path / "run"), "--prompt", "x"])


def test_an_empty_prompt_of_tokens_is_refused(opened):
    with pytest.raises(ConfigError, match="a prompt is empty"):
        generate(opened.model, [[1], []], 3)


# ---- the distribution that is drawn from


PROBABILITIES = np.array([0.10, 0.50, 0.15, 0.25])
DRAWS = 40_000


def shares(probabilities: np.ndarray, **sampling: float) -> np.ndarray:
    """How often each token is drawn."""
    logits = jnp.tile(jnp.log(jnp.asarray(probabilities, jnp.float32))[None], (DRAWS, 1))
    tokens = np.asarray(draw(jax.random.key(0), logits, Sampling(**sampling)))
    return np.bincount(tokens, minlength=len(probabilities)) / DRAWS


def renormalised(probabilities: np.ndarray, kept: list[int]) -> np.ndarray:
    some = np.where(np.isin(np.arange(len(probabilities)), kept), probabilities, 0)
    return some / some.sum()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({}, PROBABILITIES),
        ({"temperature": 0.5}, PROBABILITIES**2 / (PROBABILITIES**2).sum()),
        ({"temperature": 2.0}, PROBABILITIES**0.5 / (PROBABILITIES**0.5).sum()),
        ({"temperature": 0}, renormalised(PROBABILITIES, [1])),
        ({"top_k": 1}, renormalised(PROBABILITIES, [1])),
        ({"top_k": 2}, renormalised(PROBABILITIES, [1, 3])),
        ({"top_k": 9}, PROBABILITIES),
        ({"top_p": 0.45}, renormalised(PROBABILITIES, [1])),
        ({"top_p": 0.70}, renormalised(PROBABILITIES, [1, 3])),
        ({"top_p": 0.80}, renormalised(PROBABILITIES, [1, 2, 3])),
        ({"top_p": 1.0}, PROBABILITIES),
        # 0.5 of 0.75 is two thirds: of what top_k leaves, top_p needs one token only.
        ({"top_k": 2, "top_p": 0.6}, renormalised(PROBABILITIES, [1])),
        # Squared, 0.5 becomes 0.72 of the whole, so one token is enough where two were needed.
        ({"temperature": 0.5, "top_p": 0.7}, renormalised(PROBABILITIES, [1])),
    ],
    ids=str,
)
def test_tokens_are_drawn_from_the_distribution_that_was_asked_for(sampling, expected):
    found = shares(PROBABILITIES, **sampling)
    # Five standard deviations of a share, and nothing at all where the probability is zero.
    np.testing.assert_allclose(found, expected, atol=5 * 0.5 / math.sqrt(DRAWS))
    assert (found[expected == 0] == 0).all()


def test_equal_logits_at_a_cut_off_are_all_kept():
    assert (shares(np.array([0.4, 0.4, 0.2]), top_k=1)[:2] > 0.45).all()
    assert shares(np.array([0.3, 0.3, 0.3, 0.1]), top_p=0.5)[3] == 0
