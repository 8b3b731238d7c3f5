"""`python -m trainer.generate --run DIR --prompt TEXT [--prompt TEXT ...]`: continue text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from trainer.evaluate import STEP_HELP, positive, read_depth, step_or_name

USUAL_TOKENS = 200
"""Drawn for each prompt where the context has room for them."""


def seed(text: str) -> int:
    """`--seed`: what JAX takes whole, as the seed of a config."""
    if not text.isdecimal() or len(text) > 10 or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to {2**31 - 1:,}, not {text!r}")
    return int(text)


def main(argv: Sequence[str]) -> int:
    """The command line; prints each prompt with its continuation."""
    parser = argparse.ArgumentParser(prog="python -m trainer.generate", description=__doc__)
    parser.add_argument("--run", required=True, help="run directory")
    parser.add_argument("--step", type=step_or_name, default=None, help=STEP_HELP)
    parser.add_argument("--prompt", action="append", default=None, help="text to continue; several are run as one batch")
    parser.add_argument(
        "--tokens",
        type=positive,
        default=None,
        help=f"tokens to draw for each prompt (default: {USUAL_TOKENS}, or what the context leaves after the longest prompt)",
    )
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token")
    parser.add_argument("--top_k", type=positive, default=None, help="draw among this many most likely tokens")
    parser.add_argument("--top_p", type=float, default=None, help="draw among the fewest tokens that reach this probability")
    parser.add_argument("--seed", type=seed, default=0, help="of the draws")
    parser.add_argument(
        "--context", type=positive, default=None, help="longest prompt and text together (default: as in training)"
    )
    parser.add_argument("--depth", default=None, help="another way to run the same weights, as JSON with a name, or a name")
    parser.add_argument("--draft", default=None, help="draft tokens by this depth strategy (JSON), and check them with --depth")
    parser.add_argument("--draft_tokens", type=positive, default=None, help="with --draft: tokens of a draft (default 4)")
    arguments = parser.parse_args(argv)
    from strata import ConfigError
    from trainer import devices, load
    from trainer.sampling import Sampling, generate
    from trainer.speculative import speculate

    if arguments.draft_tokens is not None and arguments.draft is None:
        raise ConfigError("--draft_tokens is the length of a draft: give --draft too, the strategy that makes it")
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    devices.use_compilation_cache()
    run = load(arguments.run, arguments.step)
    for note in run.notes:
        print(f"note: {note}", file=sys.stderr)
    if run.tokenizer is None:
        raise ConfigError(f"data.name = {run.config.data.name!r} is not text: there is nothing to prompt or to print")
    texts = arguments.prompt or [""]
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"prompt {text[:40]!r} holds bytes that are not UTF-8") from None
    prompts = [[run.tokenizer.separator, *run.tokenizer.encode(text).tolist()] for text in texts]
    context = arguments.context or run.config.data.sequence_length
    for text, prompt in zip(texts, prompts, strict=True):
        if len(prompt) + (arguments.tokens or 1) > context:
            raise ConfigError(
                f"prompt {text[:40]!r} has {len(prompt)} tokens with the separator, and {arguments.tokens or 1} more would "
                f"exceed the context of {context} tokens that the model was trained on; shorten it, "
                f"{'ask for fewer with --tokens, ' if arguments.tokens else ''}or give --context to go beyond it"
            )
    count = arguments.tokens or min(USUAL_TOKENS, context - max(map(len, prompts)))
    how = {"sampling": sampling, "seed": arguments.seed, "banned": [run.tokenizer.separator]}
    depth = read_depth(arguments.depth, run)
    if arguments.draft is None:
        tokens = generate(run.model, prompts, count, depth=depth, **how)
    else:
        draft = read_depth(arguments.draft, run, "--draft")
        drafts = min(arguments.draft_tokens or 4, count)
        tokens, seen = speculate(run.model, prompts, count, draft=draft, drafts=drafts, depth=depth, **how)
        share = seen.accepted / max(1, seen.drafted)
        words = f"{seen.accepted} of {seen.drafted} drafted tokens accepted ({share:.0%}) in {seen.rounds} rounds"
        print(f"note: {words}", file=sys.stderr)
    for text, row in zip(texts, tokens, strict=True):
        print(f"{text}{run.tokenizer.decode(row)}")
    return 0


if __name__ == "__main__":
    from trainer.command import run

    run(main)
