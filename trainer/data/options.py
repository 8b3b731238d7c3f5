"""Options of every data source. Imports no JAX: a config is checked before JAX is loaded.

Text is described in two kinds. `"data.source"` is a supply of documents or tokens alone, as it appears in the list
`mixture.sources`; `"data"` is a whole data set, which adds how batches are cut. `python_source`, `text_files` and
`tokens` exist as both and share the same fields.
"""

from __future__ import annotations

from collections.abc import Iterator

from strata import option, options, parts, register
from strata.registry import base

Problems = Iterator[tuple[str, str]]

MIXTURE_BLOCK = 4096
"""Examples after which a mixture has drawn from every source exactly its share; shares are rounded to 1 / this."""


@options
class Batches:
    """How any data is cut into batches."""

    sequence_length: int = option(256, "tokens in a row of a batch", least=1)
    batch_size: int = option(16, "sequences per update, over all devices and micro-batches", least=1)
    seed: int | None = option(None, "of the order of examples; None: the top-level seed", least=0, most=2**31 - 1)
    workers: int = option(
        0,
        "threads that read ahead of training, in the same order for any number; 0: batches are read when asked for",
        least=0,
        key="execution",
    )
    prefetch: int = option(8, "batches kept ready when workers > 0", least=1, key="execution")


@options
class Text(Batches):
    """Batches of packed documents."""

    tokenizer: str = option("bytes", "bytes (256 values and a separator), or the path of a Hugging Face tokenizer.json")


@options
class HeldOut:
    """What is kept from training to measure the validation loss."""

    held_out: float = option(0.05, "fraction kept for validation", above=0, below=1)


@options
class PythonSource(HeldOut):
    """Python source text that is on this machine: every file is a document, held out by a hash of its path."""

    which: str = option(
        "standard_library",
        "standard_library: about 12 MB of code and prose; site_packages: every installed package; all: both",
        among=("standard_library", "site_packages", "all"),
    )
    tests: bool = option(False, "with the directories named test, tests or idle_test")
    max_bytes: int | None = option(None, "stop once this many bytes are taken, in an order mixed by hash; None: all", least=1)


@options
class TextFiles(HeldOut):
    """Documents from .txt and .md (one a file), .jsonl (one a line) and .parquet (one a row)."""

    files: tuple[str, ...] = option((), "globs of training files; ** descends into directories")
    validation_files: tuple[str, ...] = option((), "globs of validation files; none: `held_out` of `files` is kept instead")
    split: str = option(
        "documents",
        "without validation_files: keep whole documents, drawn by a hash of their content, or the tail of every document",
        among=("documents", "tail"),
    )
    field: str = option("text", "the field of a .jsonl object, or the column of a .parquet file, that holds the text")

    def problems(self) -> Problems:
        """There must be something to read."""
        if not self.files:
            yield "files", "give one glob or more, such as ('corpus/**/*.txt',)"


@options
class Tokens:
    """Token shards written by `python -m trainer.data write`, memory-mapped."""

    directory: str | None = option(None, "directory that holds index.json and the shards")
    verify: bool = option(
        True, "compare every shard with its SHA-256 at start (about 1 s a GB); False: header and size only", key="execution"
    )

    def problems(self) -> Problems:
        """The directory has no default."""
        if self.directory is None:
            yield "directory", "give the directory that `python -m trainer.data write` wrote"


@base("data.source")
@options
class Weighted:
    """One source of a mixture; one that does not say weighs 1."""

    weight: float = option(1.0, "share of the examples, relative to the other sources", above=0)


@register("data.source", "python_source", implementation="trainer.data.python_source:read_corpus")
@options
class PythonSourcePart(Weighted, PythonSource):
    """Python source text that is on this machine."""


@register("data.source", "text_files", implementation="trainer.data.text_files:read_corpus")
@options
class TextFilesPart(Weighted, TextFiles):
    """Documents from files."""


@register("data.source", "tokens", implementation="trainer.data.tokens:read_corpus")
@options
class TokensPart(Weighted, Tokens):
    """Token shards."""


@register("data", "python_source", implementation="trainer.data.text:python_source")
@options
class PythonSourceData(PythonSource, Text):
    """Python source text that is on this machine."""


@register("data", "text_files", implementation="trainer.data.text:text_files")
@options
class TextFilesData(TextFiles, Text):
    """Documents from files."""


@register("data", "tokens", implementation="trainer.data.text:tokens")
@options
class TokensData(Tokens, Text):
    """Token shards."""


@register("data", "mixture", implementation="trainer.data.text:mixture")
@options
class Mixture(Text):
    """Several sources in fixed proportions, each with a position and an order of its own."""

    sources: tuple = parts("data.source", "the sources, each with a weight")

    def problems(self) -> Problems:
        """Every source must get at least one example of a block."""
        if not self.sources:
            yield "sources", "give a list of sources, such as [dict(name='python_source', weight=1.0), ...]"
        total = sum(source.weight for source in self.sources)
        for i, source in enumerate(self.sources):
            if source.weight / total * MIXTURE_BLOCK < 0.5:
                yield f"sources.{i}.weight", f"a share of {source.weight / total:.2g} is below 1 in {2 * MIXTURE_BLOCK}"


@options
class Synthetic(Batches):
    """Examples computed from the seed and their number alone."""

    validation_examples: int = option(512, "sequences of the validation set, drawn from a stream of their own", least=1)


@register("data", "bigram", implementation="trainer.data.bigram:bigram")
@options
class Bigram(Synthetic):
    """A stationary Markov chain: some symbols have one successor, the others several (the toy of Wen et al. 2024).

    The entropy rate is known, and printed: it is the lowest loss that any model can reach. `arXiv:2410.05192` gives the
    idea (certain rows of the table are flat directions, uncertain rows sharp ones); the sizes are choices of ours.
    """

    vocabulary: int = option(64, "symbols; their table takes 8 V^2 bytes, a few times over", least=2, most=8192)
    deterministic: float = option(0.5, "fraction of symbols with exactly one successor", least=0, most=1)
    successors: int = option(8, "successors of every other symbol", least=1)
    concentration: float | None = option(None, "Dirichlet parameter of the successors' probabilities; None: all equal", above=0)
    table_seed: int = option(0, "of the transition table, apart from the seed of the examples", least=0, most=2**31 - 1)

    def problems(self) -> Problems:
        """Successors are distinct symbols."""
        if self.successors > self.vocabulary:
            yield "successors", f"there are only {self.vocabulary} symbols (vocabulary)"


@register("data", "recall", implementation="trainer.data.recall:recall")
@options
class Recall(Synthetic):
    """Multi-query associative recall (Arora et al. 2023, Zoology, arXiv:2312.04927).

    Key-value pairs, then their keys again at gaps that follow a power law, each followed by its value. Only the
    values that follow a repeated key are scored, so the optimum is a loss of 0.
    """

    vocabulary: int = option(512, "tokens: a blank, then keys, then as many values", least=5, most=65_536)
    pairs: int = option(16, "key-value pairs in a row, all of them asked for", least=1)
    power: float = option(0.01, "exponent of the gaps: below 1 queries come early, 1 is uniform", above=0)
    filler: str = option("random", "what stands between queries: values drawn at random, or blanks", among=("random", "blank"))

    def problems(self) -> Problems:
        """The pairs must fit into a row, and the keys into the vocabulary."""
        if 4 * self.pairs > self.sequence_length + 1:
            yield (
                "pairs",
                (
                    f"{self.pairs} pairs and their queries need 4 x {self.pairs} tokens; a row has "
                    f"sequence_length + 1 = {self.sequence_length + 1}"
                ),
            )
        if self.pairs > (self.vocabulary - 1) // 2:
            yield "pairs", f"a vocabulary of {self.vocabulary} has only {(self.vocabulary - 1) // 2} keys"
