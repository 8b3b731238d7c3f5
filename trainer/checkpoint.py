"""Checkpoints that are whole or not there at all: Orbax writes the arrays, a checksum manifest decides what is eligible.

    checkpoints/<step>/state/           the arrays, written by Orbax (OCDBT, uncompressed)
    checkpoints/<step>/host.json        what lives on the host: data position, metrics offset, best so far, counters
    checkpoints/<step>/manifest.json    sizes and SHA-256 of all of the above, written last
    checkpoints/<step>.partial/         a save in progress, or one that a crash cut short
    checkpoints/<step>.deleted/         being removed

A save writes into `<step>.partial`, syncs and hashes every file, writes the manifest, and then renames the directory; so
a process killed at any moment leaves either a complete step or a leftover that is never looked at. Deleting goes the same
way backwards. Nothing in a checkpoint is executed or unpickled.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from strata import ConfigError, StrataError
from trainer import manifest, orbax_errors, processes, retention, state_arrays
from trainer.atomic_files import sync_directory, write_bytes_atomic

_HOST = "host.json"
_LEFTOVER = re.compile(r"\d+\.(partial|deleted)")


class Restored(NamedTuple):
    """What `Checkpointer.restore` returns."""

    state: Any  # the structure of the abstract state, of jax.Array
    host: dict[str, Any]
    step: int


class Checkpointer:
    """Saves, retains, verifies and restores the checkpoints of one run.

    In a run of several processes every method that the class calls collective (`save`, `wait`, `close`, `restore`) must be
    called by all of them in the same order, on a file system that they share; process 0 writes the manifest, after the
    files of all processes are complete, and deletes.

    Args:
      directory: `checkpoints/` of a run directory; made by the first save.
      keep_latest: the newest this many are kept, at least 1.
      keep_every: every step that is a multiple of this is kept too; None: off.
      keep_best: this many with the lowest metric are kept too.
      named: these steps are kept too, whatever comes after them.
      say: receives warnings in words, such as a damaged checkpoint that was passed over; default: print to stderr.
      committed: called in process 0, from the thread that writes, with every step whose save is complete.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep_latest: int = 2,
        keep_every: int | None = None,
        keep_best: int = 1,
        named: Collection[int] = (),
        say: Callable[[str], None] | None = None,
        committed: Callable[[int], None] = lambda step: None,
    ):
        self.directory = Path(directory).absolute()
        self._kept = functools.partial(
            retention.kept, keep_latest=keep_latest, keep_every=keep_every, keep_best=keep_best, named=named
        )
        self._say = say or (lambda text: print(text, file=sys.stderr, flush=True))
        self._committed = committed
        self._thread: threading.Thread | None = None
        self._failure: StrataError | None = None
        self._saving: int | None = None  # the step in flight
        self._saved: int | None = None  # the step this object completed last
        self._cleaned = False
        self._verified: dict[int, tuple[tuple[Any, ...], manifest.Manifest | str]] = {}  # fingerprint, manifest or damage

    # ---- writing

    def save(self, step: int, state: Any, host: dict[str, Any], *, metric: float | None = None, blocking: bool = False) -> None:
        """Starts an asynchronous save of `checkpoints/<step>`. Collective.

        Waits for the previous save first, so that at most one is in flight. If that one failed, `say` is told, and this one
        is tried in its stead and waited for, so that only two failures in a row are an error. On return the state may be
        donated: its bytes are on the host already (on CPU the runtime gives a donated buffer that is still being written
        another home). Saving the step that this object saved last does nothing; another directory of the same step is
        replaced.

        Args:
          step: updates done, 0 or more.
          state: a pytree of `jax.Array`; typed PRNG keys are refused (save their raw uint32 data).
          host: JSON-able; tuples come back as lists, floats (non-finite ones too) come back exactly.
          metric: for keep-best, lower is better; None or non-finite: never best.
          blocking: return only when the checkpoint is complete.

        Raises:
          StrataError: this save could not begin, or it was waited for and failed (full disk, unwritable directory ...);
            what was complete before is untouched.
          TypeError: a leaf of `state` is not a `jax.Array`, or `host` is not JSON.
        """
        retried = self._report()
        if step == self._saved:
            return
        arrays, _ = state_arrays.by_path(state)
        for path, leaf in arrays.items():
            if not isinstance(leaf, jax.Array) or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
                raise TypeError(f"state {path} is a {type(leaf).__name__}; checkpoints hold jax.Array of plain dtypes only")
        host_bytes = (json.dumps(host, sort_keys=True) + "\n").encode()
        declared = state_arrays.describe(arrays)
        partial = self.directory / f"{step}.partial"
        failure = None
        try:
            if jax.process_index() == 0:
                self._clean()
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                # Uncompressed: fewer bytes than these cannot do, so do not write until the disk is full.
                self._require_space(sum(leaf.nbytes for leaf in arrays.values()))
        except OSError as error:
            failure = self._describe(step, error)
            self._discard(partial)
        processes.agree(failure, f"the checkpoint of step {step} could not be written")
        try:
            # Orbax refuses empty arrays; the manifest alone describes those.
            full = {path: leaf for path, leaf in arrays.items() if leaf.size}
            if full:
                self._orbax.save(partial / manifest.ARRAYS, args=orbax_errors.load_orbax().args.PyTreeSave(full))
        except Exception as error:
            self._discard(partial)
            raise self._describe(step, error) from error
        self._saving = step
        self._thread = threading.Thread(
            target=self._finish, args=(step, partial, host_bytes, declared, metric), name="checkpoint"
        )
        self._thread.start()
        if blocking or retried:
            self.wait()
        if retried:
            self._say(f"the checkpoint of step {step} is saved instead")

    @property
    def failed(self) -> bool:
        """Whether the save in flight has failed in this process, which the next `save` or `wait` will say."""
        return self._failure is not None

    def _report(self) -> bool:
        """`wait`, with a failure said and not raised. Returns whether there was one, the same in every process."""
        try:
            self.wait()
        except StrataError as error:
            self._say(str(error))
            return True
        return False

    def wait(self) -> None:
        """Blocks until no save is in flight. Collective.

        Raises:
          StrataError: the save failed in this process or in another one; it names the path and the cause.
        """
        if self._thread is None:
            return
        self._thread.join()
        failure, step, self._thread, self._failure, self._saving = self._failure, self._saving, None, None, None
        processes.agree(failure, f"the checkpoint of step {step} could not be written")
        self._saved = step

    def close(self, quietly: bool = False) -> None:
        """`wait`, then releases Orbax's threads. Collective; the object can be used again.

        Args:
          quietly: a failed save is said and not raised, for a run that ends for another reason.
        """
        try:
            self._report() if quietly else self.wait()
        finally:
            self._release()

    def _finish(
        self, step: int, partial: Path, host: bytes, arrays: dict[str, tuple[str, tuple[int, ...]]], metric: float | None
    ) -> None:
        """The background half of a save. Returns normally or leaves the reason in `_failure`."""
        final = self.directory / str(step)
        try:
            self._orbax.wait_until_finished()  # with several processes: until the files of all of them are complete
            if jax.process_index() != 0:
                return
            write_bytes_atomic(partial / _HOST, host)
            written = manifest.write_manifest(partial, step=step, metric=metric, arrays=arrays)
            if final.exists():
                self._delete(final)
            os.rename(partial, final)
            sync_directory(self.directory)
        except Exception as error:
            self._failure = self._describe(step, error)
            self._failure.__cause__ = error
            self._discard(partial)
            return
        self._verified[step] = (manifest.fingerprint(final), written)
        try:
            self._committed(step)
            self._retire(step)
        except StrataError as error:
            self._say(str(error))
        except OSError as error:  # the checkpoint itself is complete
            self._say(f"an old checkpoint in {self.directory} could not be deleted: {orbax_errors.cause(error)}")

    def _retire(self, newest: int) -> None:
        """Deletes what no policy keeps. Damaged steps count for no policy and are left for a person to look at."""
        metrics = {step: good.metric for step in self._on_disk() if isinstance(good := self._check(step), manifest.Manifest)}
        for step in set(metrics) - self._kept(metrics) - {newest}:
            self._delete(self.directory / str(step))

    def _delete(self, path: Path) -> None:
        doomed = path.with_name(f"{path.name}.deleted")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(path, doomed)
        shutil.rmtree(doomed) if doomed.is_dir() else doomed.unlink()

    def _clean(self) -> None:
        """Removes what a killed process left; a complete step is never named like that."""
        if self._cleaned or not self.directory.exists():
            return
        for path in self.directory.iterdir():
            if _LEFTOVER.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._cleaned = True

    def _require_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            text = f"{os.strerror(errno.ENOSPC)}: the state has {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free"
            raise OSError(errno.ENOSPC, text)

    def _discard(self, partial: Path) -> None:
        """Gives a full disk its space back. A failure here has its reason in the error that led to it."""
        self._release()  # Orbax raises the error of a failed write again at its next use
        if jax.process_index() == 0:
            shutil.rmtree(partial, ignore_errors=True)

    def _describe(self, step: int, error: BaseException) -> StrataError:
        return StrataError(
            f"the checkpoint of step {step} could not be written to {self.directory}: {orbax_errors.cause(error)}. "
            "Checkpoints that were complete before are untouched."
        )

    @functools.cached_property
    def _orbax(self) -> Any:
        ocp = orbax_errors.load_orbax()
        # Compression costs more time than the disk saves: trained floats shrink by less than a tenth.
        return ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False))

    def _release(self) -> None:
        if orbax := self.__dict__.pop("_orbax", None):
            with contextlib.suppress(Exception):  # the error of a failed write, which was raised already
                orbax.close()

    # ---- reading

    def steps(self) -> list[int]:
        """Eligible steps in ascending order: every byte agrees with the manifest (read once while files stay unchanged)."""
        return [step for step in self._on_disk() if isinstance(self._check(step), manifest.Manifest)]

    def latest(self) -> int | None:
        """The newest eligible step."""
        return next((step for step in reversed(self._on_disk()) if isinstance(self._check(step), manifest.Manifest)), None)

    def best(self) -> int | None:
        """The eligible step with the lowest metric, None where none has a metric."""
        metrics = {step: good.metric for step in self._on_disk() if isinstance(good := self._check(step), manifest.Manifest)}
        return next(iter(retention.ranked(metrics)), None)

    def damage(self, step: int) -> str | None:
        """Why `step` is not eligible, in words; None if it is."""
        found = self._check(step)
        return found if isinstance(found, str) else None

    def metric(self, step: int) -> float | None:
        """The metric that `step` was saved with.

        Raises:
          StrataError: the step is not eligible.
        """
        found = self._check(step)
        if isinstance(found, str):
            raise StrataError(f"checkpoint {self.directory / str(step)} cannot be used: {found}")
        return found.metric

    def restore(self, abstract: Any, step: int | None = None, *, partial: bool = False) -> Restored | None:
        """Loads a checkpoint onto the devices that `abstract` asks for. Collective.

        Every file is read and compared with the manifest first. Without `step`, a newest checkpoint that is damaged is
        passed over for the next older good one, and `say` is told.

        Args:
          abstract: a pytree of `jax.ShapeDtypeStruct` with sharding (none: the default device); any mesh and device count.
          step: a named step; None: the newest good one.
          partial: `abstract` may be a part of what was saved, e.g. the parameters alone.

        Returns:
          State, host data and step; None when there is no checkpoint at all (empty directories are passed over).

        Raises:
          ConfigError: there is no such step.
          StrataError: the named step is damaged; or there are checkpoints and not one is good; or shapes, dtypes or
            structure differ from `abstract`, with the paths that differ.
        """
        self.wait()
        chosen = processes.from_first(self._choose, step)
        if chosen is None:
            return None
        directory = self.directory / str(chosen)
        saved = manifest.read_manifest(directory)
        wanted, structure = state_arrays.by_path(abstract)
        differ = state_arrays.differences(saved.arrays, state_arrays.describe(wanted), partial=partial)
        if differ:
            raise StrataError("\n  ".join([f"checkpoint {directory} does not fit this run:", *differ]))
        wanted = {path: state_arrays.placed(leaf) for path, leaf in wanted.items()}
        arrays = self._load(directory / manifest.ARRAYS, {path: leaf for path, leaf in wanted.items() if leaf.size})
        for path, leaf in wanted.items():
            if not leaf.size:
                empty = np.zeros(leaf.shape, leaf.dtype)
                arrays[path] = jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index, x=empty: x[index])
        if not partial:
            self._saved = chosen  # it is there and whole: saving the same state again would risk it for nothing
        host = json.loads((directory / _HOST).read_bytes())
        return Restored(jax.tree.unflatten(structure, [arrays[path] for path in wanted]), host, chosen)

    def _choose(self, step: int | None) -> int | None:
        if step is not None:
            found = self._check(step, again=True)
            if isinstance(found, str):
                others = ", ".join(map(str, self.steps())) or "none"
                kind = StrataError if (self.directory / str(step)).is_dir() else ConfigError  # damaged, or asked for in vain
                raise kind(f"checkpoint {self.directory / str(step)} cannot be used: {found}. Good steps here: {others}.")
            return step
        passed = []
        for candidate in reversed(self._on_disk()):
            found = self._check(candidate, again=True)
            if isinstance(found, manifest.Manifest):
                if passed:
                    self._say(f"{'; '.join(passed)}. Going on from step {candidate}, the next older good checkpoint.")
                return candidate
            if (self.directory / str(candidate)).exists():  # not one that the run it belongs to has just deleted
                passed.append(f"checkpoint {self.directory / str(candidate)} is damaged and was not loaded: {found}")
        if not passed:
            return None
        raise StrataError(f"{'; '.join(passed)}. No good checkpoint is left; remove the directory to start from step 0.")

    def _load(self, directory: Path, wanted: dict[str, Any]) -> dict[str, Any]:
        if not wanted:
            return {}
        ocp = orbax_errors.load_orbax()
        restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
        return self._orbax.restore(
            directory, args=ocp.args.PyTreeRestore(wanted, restore_args=restore_args, partial_restore=True)
        )

    def _check(self, step: int, *, again: bool = False) -> manifest.Manifest | str:
        """The manifest of an eligible step, or what is wrong with it."""
        directory = self.directory / str(step)
        if not directory.is_dir():
            return "there is no such checkpoint"
        found = manifest.fingerprint(directory)
        if not again and step in self._verified and self._verified[step][0] == found:
            return self._verified[step][1]
        try:
            result: manifest.Manifest | str = manifest.verify(directory)
        except manifest.Damaged as error:
            result = str(error)
        self._verified[step] = (found, result)
        return result

    def _on_disk(self) -> list[int]:
        """Steps that have a directory with something in it, whatever its state, in ascending order."""
        try:
            with os.scandir(self.directory) as entries:
                names = [entry.name for entry in entries if entry.is_dir() and entry.name.isdecimal()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StrataError(f"the checkpoints in {self.directory} cannot be read: {orbax_errors.cause(error)}") from error
        return sorted(int(name) for name in names if name == str(int(name)) and self._filled(self.directory / name))

    @staticmethod
    def _filled(directory: Path) -> bool:
        try:
            with os.scandir(directory) as entries:
                return any(entries)
        except FileNotFoundError:  # deleted since it was listed, by the run that is being read
            return False
