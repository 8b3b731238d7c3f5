"""Reading a config file: `configs/x.py` with a `get_config`, or a run's own `config.json`."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from strata import ConfigError
from strata.values import Mismatch, plain


def split_argument(text: str) -> tuple[Path, str]:
    """`configs/x.py:small` to its path and `get_config` argument, which may hold colons of its own."""
    if ":" not in text or Path(text).exists():
        return Path(text), ""
    pieces = text.split(":")
    heads = [":".join(pieces[:count]) for count in range(1, len(pieces))]
    head = next((head for head in heads if Path(head).is_file()), heads[0])
    return Path(head), text[len(head) + 1 :]


def read(text: str) -> tuple[dict[str, Any], Path]:
    """The tree that a config file defines, unchecked, and the file's path.

    Raises:
      ConfigError: the file is missing, raises, has no `get_config`, or returns no config.
    """
    path, argument = split_argument(text)
    if path.is_dir():
        own = path / "config.json"
        instead = f"the config of the run there is {own}" if own.is_file() else "give a .py file with get_config in it"
        raise ConfigError(f"config file {path} is a directory; {instead}")
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(str(path.parent / name) for name in near)}?" if near else ""
        raise ConfigError(f"config file {path} does not exist{hint}")
    if path.suffix == ".json":
        if argument:
            raise ConfigError(f"{path} is a resolved config and takes no argument (got {argument!r})")
        return _read_json(path), path
    if path.suffix != ".py":
        raise ConfigError(f"config file {path} is neither a .py file with get_config nor a run's config.json")
    return _read_python(path, argument), path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"config file {path} is not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {path} holds {type(tree).__name__}, not a config")
    return tree


def _read_python(path: Path, argument: str) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.path.append(str(path.resolve().parent))  # one config imports another beside it; last, so it shadows nothing
    try:
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise ConfigError(f"config file {path} defines no function get_config(arg='')")
        if argument and not inspect.signature(get_config).parameters:
            raise ConfigError(f"get_config in {path} takes no argument (got {argument!r})")
        returned = get_config(argument) if inspect.signature(get_config).parameters else get_config()
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(_explain(error, path)) from None
    finally:
        sys.path.remove(str(path.resolve().parent))
    try:
        tree = plain(returned)
    except Mismatch as mismatch:
        raise ConfigError(f"get_config in {path} returned a config with something that is not data: {mismatch}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"get_config in {path} returned {type(returned).__name__}, not a ConfigDict")
    return tree


def _explain(error: BaseException, path: Path) -> str:
    """One sentence with the line of the user's file that raised."""
    frames = traceback.extract_tb(error.__traceback__)
    here = [frame for frame in frames if Path(frame.filename).resolve() == path.resolve()]
    line = f"{path}:{here[-1].lineno}" if here else str(path)
    if isinstance(error, SyntaxError) and error.filename:
        line = f"{error.filename}:{error.lineno}"
    return f"config file {line} raised {type(error).__name__}: {error}"
