"""Weights & Biases as a mirror of `metrics.jsonl`. Imports no JAX, and wandb only when it is used.

Online, a restart continues the run of the same id. Offline, wandb cannot continue a run, so a restart begins a fresh local
one that holds every row of `metrics.jsonl` again and removes those it replaces: what lies under `wandb/` is always one
complete run, and `wandb sync DIR/wandb/offline-run-*` uploads it. Either kind can be rebuilt at any time with `rebuild`.
"""

from __future__ import annotations

import configparser
import netrc
import os
import shutil
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from strata import ConfigError, StrataError
from trainer.metrics.jsonl import SPLITS, read_metrics, scalars

MODES = ("disabled", "auto", "offline", "online")


def resolve_mode(mode: str) -> str:
    """`online` or `offline` for `auto`, by whether there is an account (an API key in the environment or in netrc).

    Raises:
      ConfigError: `online` without an account.
    """
    if mode not in MODES:
        raise ValueError(f"W&B mode {mode!r} is not one of {', '.join(MODES)}")
    if mode in ("disabled", "offline"):
        return mode
    if _has_account():
        return "online"
    if mode == "online":
        raise ConfigError(
            f"log.wandb = 'online', but there is no W&B account for {_host()} here: run `wandb login` or set WANDB_API_KEY, "
            "or choose auto or offline, which need none"
        )
    return "offline"


class WandbMirror:
    """Repeats rows to one W&B run. With mode `disabled` it does nothing and wandb is not imported.

    Args:
      directory: the run directory; wandb's files go to `wandb/` in it.
      mode: one of `MODES`.
      run_id: the run's id, the same at every restart.
      project, group, name: as W&B shows them.
      config: the resolved config, as nested dicts.
      history: `metrics.jsonl` of a run that is resumed, after it was cut to the restored step; replayed when offline.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        mode: str,
        run_id: str,
        project: str,
        group: str | None = None,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        history: str | os.PathLike[str] | None = None,
    ):
        self.mode = resolve_mode(mode)
        self._run = None
        self._sent = dict.fromkeys(SPLITS, -1)  # the last step of each split that W&B has
        if self.mode == "disabled":
            return
        import wandb

        replaced = _offline_runs(Path(directory), run_id) if self.mode == "offline" else []
        try:
            self._run = wandb.init(
                dir=str(directory),
                mode=self.mode,
                id=run_id,
                resume="allow" if self.mode == "online" else None,
                project=project,
                group=group,
                name=name,
                config=dict(config or {}),
                settings=wandb.Settings(silent=True, x_disable_meta=True, save_code=False, disable_git=True, console="off"),
            )
        except Exception as error:  # of many kinds, also from the service that wandb starts
            raise StrataError(
                f"W&B did not start ({self.mode}): {error or type(error).__name__}. Nothing is lost: the run goes on with "
                "log.wandb=offline or disabled, and `python -m trainer.mirror` repeats it to W&B later"
            ) from error
        for split in SPLITS:
            self._run.define_metric(f"{split}/*", step_metric=f"{split}/step")
        self._run.define_metric("timing/*", step_metric="train/step")
        if self._run.resumed:
            self._sent = {split: int(self._run.summary.get(f"{split}/step", -1)) for split in SPLITS}
        if self.mode == "offline":
            if history is not None and Path(history).exists():
                for row in read_metrics(history):
                    self.write(row)
            here = Path(self._run.dir).resolve().parent
            for path in replaced:
                if path.resolve() != here:
                    shutil.rmtree(path, ignore_errors=True)

    @property
    def url(self) -> str | None:
        """Where the run can be seen; None offline."""
        return self._run.url if self._run and self.mode == "online" else None

    def write(self, row: Mapping[str, Any]) -> None:
        """Repeats one row. A step that W&B has already (a resumed run trains it again) is not sent twice."""
        if self._run is None:
            return
        step, split = row["step"], row["split"]
        if step <= self._sent[split]:
            return
        self._sent[split] = step
        # Without `step=`: W&B's own counter would drop an evaluation that comes after a later training row.
        self._run.log({f"{split}/step": step, **scalars(row)})

    def close(self, exit_code: int = 0) -> None:
        """Finishes the upload; a non-zero exit code marks the run as failed. May be called twice."""
        if self._run is not None:
            self._run.finish(exit_code=exit_code)
            self._run = None

    def __enter__(self) -> WandbMirror:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.close(0 if kind is None else 1)


def rebuild(metrics: str | os.PathLike[str], directory: str | os.PathLike[str], **rest: Any) -> None:
    """Mirrors all of `metrics.jsonl` again, as `WandbMirror(directory, **rest)` would have done it in one go.

    Online, give a `run_id` that W&B does not have yet: it has no way to take rows back.
    """
    with WandbMirror(directory, **rest) as mirror:
        for row in read_metrics(metrics):
            mirror.write(row)


def _offline_runs(directory: Path, run_id: str) -> list[Path]:
    return sorted((directory / "wandb").glob(f"offline-run-*-{run_id}"))


def _has_account() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    named = os.environ.get("NETRC")
    try:
        return netrc.netrc(os.path.expanduser(named) if named else None).authenticators(_host()) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _host() -> str:
    """The server that wandb would use: named in the environment or in what `wandb login --host` wrote, or the public one."""
    url = os.environ.get("WANDB_BASE_URL")
    if not url:
        settings = configparser.ConfigParser(interpolation=None)
        home = Path(os.environ.get("WANDB_CONFIG_DIR") or os.path.expanduser("~/.config/wandb"))
        try:
            settings.read([home / "settings", Path("wandb") / "settings"])  # the later file counts
            url = settings.get("default", "base_url", fallback=None)
        except (configparser.Error, UnicodeDecodeError):
            url = None
    return urllib.parse.urlparse(url or "https://api.wandb.ai").hostname or ""
