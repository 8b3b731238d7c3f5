"""Compiled programs are kept where the user says, a start without such a place goes on, and a damaged one is replaced."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import pytest

from trainer import devices

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def set_to(monkeypatch):
    """What JAX was told, which the tests go on without."""
    told = {}
    monkeypatch.setattr(jax.config, "update", told.__setitem__)
    monkeypatch.setattr(devices, "repair", lambda directory: None)
    return told


def test_a_user_without_a_home_directory_starts_without_a_cache_or_with_the_one_that_is_named(monkeypatch, capsys, set_to):
    def unknown(*_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    devices.use_compilation_cache()
    assert set_to == {} and "no home directory" in capsys.readouterr().err
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/somewhere")
    devices.use_compilation_cache()
    assert set_to["jax_compilation_cache_dir"] == "/somewhere" and capsys.readouterr().err == ""


def test_a_cached_program_that_was_cut_short_is_replaced_and_said_in_one_line(tmp_path):
    code = """
        import os, pathlib, jax
        from trainer.devices import use_compilation_cache
        use_compilation_cache()
        function = jax.jit(lambda x: 2 * x)
        function(1.0)
        kept = {path: path.read_bytes() for path in pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).glob("*-cache")}
        for path, data in kept.items():
            path.write_bytes(data[: len(data) // 2])
        jax.clear_caches()
        function(1.0)
        print(len(kept), all(path.stat().st_size > len(data) // 2 for path, data in kept.items()))
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "1 True\n", done
    assert done.stderr.count("\n") == 1 and "note: the cached program jit__lambda could not be read" in done.stderr
