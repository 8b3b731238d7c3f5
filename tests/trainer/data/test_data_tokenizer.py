"""Bytes and tokenizer.json."""

import json

import numpy as np
import pytest

from strata import DataError
from trainer.data.tokenizer import HuggingFaceTokenizer, load_tokenizer

SAMPLES = ["", "plain text", "ünïcode 层 🙂\n\ttabs  and  spaces ", "<|separator|> is text here", "\x00\x7f"]


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, bpe):
    return load_tokenizer("bytes" if request.param == "bytes" else str(bpe))


@pytest.mark.parametrize("sample", SAMPLES)
def test_text_survives_and_its_bytes_are_counted(tokenizer, sample):
    ids = tokenizer.encode(sample)
    assert ids.dtype == np.uint16 and tokenizer.separator not in ids
    assert tokenizer.decode(ids) == sample and tokenizer.decode_bytes(ids) == sample.encode()
    assert tokenizer.token_bytes[ids].sum() == len(sample.encode())
    assert np.array_equal(tokenizer.encode(sample.encode()), ids)
    assert tokenizer.decode([tokenizer.separator, *ids.tolist()]) == sample


def test_the_separator_stands_for_no_bytes(tokenizer):
    assert tokenizer.token_bytes[tokenizer.separator] == 0 and len(tokenizer.token_bytes) == tokenizer.vocab_size
    assert tokenizer.separator < tokenizer.vocab_size


def test_any_bytes_survive_the_byte_tokenizer():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.decode_bytes(tokenizer.encode(bytes(range(256)))) == bytes(range(256))
    assert tokenizer.decode(tokenizer.encode(b"\xff")) == "\ufffd"


def test_many_texts_are_encoded_like_one_at_a_time(tokenizer):
    together = tokenizer.encode_many([sample.encode() for sample in SAMPLES])
    assert all(np.array_equal(ids, tokenizer.encode(sample)) for ids, sample in zip(together, SAMPLES, strict=True))


def test_a_bpe_needs_fewer_tokens_than_bytes(bpe, prose):
    sample = prose(5, 200)
    assert len(load_tokenizer(str(bpe)).encode(sample)) < 0.8 * len(sample.encode())


def test_the_fingerprint_is_of_the_vocabulary_not_of_the_path(bpe, tmp_path):
    copied = tmp_path / "copy.json"
    layout = json.loads(bpe.read_text())
    copied.write_text(json.dumps(layout, indent=7))
    assert load_tokenizer(str(copied)).fingerprint == load_tokenizer(str(bpe)).fingerprint
    vocabulary = layout["model"]["vocab"]
    (a, i), (b, j) = list(vocabulary.items())[5:7]
    vocabulary[a], vocabulary[b] = j, i
    copied.write_text(json.dumps(layout))
    assert load_tokenizer(str(copied)).fingerprint != load_tokenizer(str(bpe)).fingerprint


def test_without_a_special_token_the_separator_is_one_more_id(bpe):
    layout = json.loads(bpe.read_text())
    layout["added_tokens"] = []
    bpe.write_text(json.dumps(layout))
    tokenizer = HuggingFaceTokenizer(bpe)
    assert tokenizer.separator == 320 and tokenizer.vocab_size == 321 and len(tokenizer.token_bytes) == 321


@pytest.mark.parametrize("change", [{"normalizer": {"type": "Lowercase"}}, {"pre_tokenizer": {"type": "Whitespace"}}])
def test_a_tokenizer_that_loses_bytes_reports_no_bytes(build, bpe, change):
    layout = json.loads(bpe.read_text()) | change
    bpe.write_text(json.dumps(layout))
    assert HuggingFaceTokenizer(bpe).token_bytes is None
    dataset = build("text_files", tokenizer=str(bpe))
    assert dataset.token_bytes is None and dataset.validation_bytes is None
    assert dataset.description["bytes_exact"] is False
    assert len(dataset.raw_validation()) == dataset.description["validation"]["bytes"]
    next(dataset.train())


def test_bytes_the_vocabulary_lacks_are_noticed_in_the_text(build, bpe):
    layout = json.loads(bpe.read_text())
    for byte in "ÃÅ":  # first bytes of ü and ï among others
        layout["model"]["vocab"].pop(byte, None)
    layout["model"]["merges"] = []
    layout["model"]["vocab"] = {token: i + 1 for i, token in enumerate(t for t in layout["model"]["vocab"] if len(t) == 1)}
    bpe.write_text(json.dumps(layout))
    dataset = build("text_files", tokenizer=str(bpe))
    assert dataset.tokenizer.token_bytes is not None
    assert dataset.token_bytes is None and dataset.description["bytes_exact"] is False


def test_bad_tokenizer_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"no tokenizer file .*missing\.json"):
        load_tokenizer(str(tmp_path / "missing.json"))
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(DataError, match=r"broken\.json is not a tokenizer\.json"):
        load_tokenizer(str(tmp_path / "broken.json"))


def test_text_that_is_not_utf8_is_named_when_the_tokenizer_needs_text(build, corpus, bpe):
    (corpus / "latin.txt").write_bytes(b"caf\xe9")
    build("text_files")
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8"):
        build("text_files", tokenizer=str(bpe))
