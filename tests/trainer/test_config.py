"""The config: files, overrides, notes, archives, identity. No test here needs JAX."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from strata import ConfigError
from trainer import config as configuration
from trainer.cli import _whole, parse
from trainer.config import canonical_json, compare, config_hash, load, run_id


@pytest.fixture
def write(tmp_path):
    def write(text, name="x.py"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


BASE = """
from ml_collections import ConfigDict
def get_config(arg=""):
    c = ConfigDict()
    c.optimizer = dict(direction=dict(name="adamw", learning_rate=1e-3, b2=0.99))
    c.model = dict(width=64, heads=4, layers=int(arg or 2))
    return c
"""


def fails(source, *changes):
    with pytest.raises(ConfigError) as caught:
        load(source, changes)
    return str(caught.value)


def test_a_config_file_with_an_argument(write):
    assert load(write(BASE)).config.model.layers == 2
    assert load(write(BASE) + ":7").config.model.layers == 7


def test_an_argument_and_a_path_may_hold_colons(write, tmp_path):
    text = "def get_config(arg=''):\n    return dict(log=dict(wandb_project=arg))\n"
    (tmp_path / "a:b").mkdir()
    for path in (write(text), write(text, "a:b/x.py")):
        assert load(path + ":c:d=e:").config.log.wandb_project == "c:d=e:"
        assert load(path).config.log.wandb_project == ""
    assert f"config file {tmp_path}/none.py does not exist" in fails(f"{tmp_path}/none.py:a:b")


def test_one_config_imports_another_beside_it(write):
    write(BASE, "base_config_for_test.py")
    path = write(
        "import base_config_for_test\ndef get_config(arg=''):\n"
        "    c = base_config_for_test.get_config(arg)\n    c.model.width = 128\n    return c\n",
        "child.py",
    )
    assert load(path).config.model.width == 128


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("train.steps", "1e3", 1000),
        ("train.steps", "10_000", 10_000),
        ("model.kv_heads", "2", 2),
        ("model.head_size", "none", None),
        ("optimizer.clip_norm", "None", None),
        ("data.seed", "5", 5),
        ("log.profile", "3,5", (3, 5)),
        ("model.tie_embeddings", "true", True),
    ],
)
def test_overrides_of_every_kind(write, path, text, value):
    found = load(write(BASE), [(path, text)]).config
    for step in path.split("."):
        found = getattr(found, step)
    assert found == value


def test_a_list_of_components_is_written_on_the_command_line(write):
    changes = [("data.sources.1.name", "python_source"), ("data.sources.0.name", "text_files"), ("data.name", "mixture")]
    changes += [("data.sources.0.files", "a/*.txt"), ("data.sources.1.weight", "3")]
    first, second = load(write(BASE), changes).config.data.sources
    assert (first.name, first.files) == ("text_files", ("a/*.txt",)) and (second.name, second.weight) == ("python_source", 3.0)
    whole = [("data.name", "mixture"), ("data.sources.0", '{"name": "python_source", "weight": 2}')]
    assert load(write(BASE), whole).config.data.sources[0].weight == 2.0
    text = fails(write(BASE), ("data.name", "mixture"), ("data.sources.3.name", "python_source"))
    assert "data.sources.3 = python_source" in text and "expected an index into a list of 0" in text


def test_a_word_where_a_list_of_components_belongs_is_one_mistake(write):
    text = fails(write(BASE), ("data.name", "mixture"), ("data.sources", "python_source"))
    assert text.startswith("1 problem") and "write data.sources.0.name = 'python_source'" in text
    assert "defined in trainer/data/options.py:" in text
    assert fails(write(BASE), ("model.mixer.name", "hybrid"), ("model.mixer.pattern", "foo")).startswith("1 problem")


def test_a_nested_typo_gets_its_path_and_a_suggestion(write):
    text = fails(write(BASE), ("optimizer.direction.learning_rat", "1"))
    assert "optimizer.direction.learning_rat" in text and "did you mean optimizer.direction.learning_rate" in text
    assert "optim/options/" in text


def test_every_mistake_is_listed(write):
    text = fails(
        write(BASE), ("model.layers", "1.5"), ("trian.steps", "3"), ("optimizer.schedule.name", "cosi"), ("seed", "-1")
    )
    for path in ("model.layers", "trian", "optimizer.schedule.name", "seed"):
        assert f"  {path}" in text
    assert text.startswith("4 problems")


def test_combinations_are_checked_beside_wrong_values_that_they_do_not_read(write):
    text = fails(
        write(BASE), ("train.steps", "1.5"), ("model.logit_softcap", "-1"), ("model.heads", "7"), ("data.batch_size", "7"),
        ("train.accumulation", "2"), ("log.profile", "1,2,3"), ("evaluate.every", "x"), ("mesh.tensor", "x"),
        ("evaluate.batch_size", "3"), ("mesh.data", "2"),
    )  # fmt: skip
    assert text.startswith("8 problems")
    for path in (
        "train.steps", "model.logit_softcap", "model.heads", "train.accumulation", "log.profile", "evaluate.every",
        "mesh.tensor", "evaluate.batch_size",
    ):  # fmt: skip
        assert f"  {path} = " in text, path


@pytest.mark.parametrize(
    ("changes", "paths"),
    [
        (
            {"model.layers": "1",
             "model.mixer": '{"name": "hybrid", "pattern": [{"name": "attention", "window": "x"}, {"name": "gla"}]}'},
            ["model.mixer.pattern.0.window", "model.mixer.pattern"],
        ),
        (
            {"model.logit_softcap": "-1", "model.linear.name": "lora", "model.linear.rank": "100000"},
            ["model.logit_softcap", "model.linear.rank"],
        ),
        ({"model.logit_softcap": "-1", "model.width": "12", "model.heads": "4", "model.kv_heads": "3"}, ["model.kv_heads"]),
        (
            {"optimizer.schedule.final": "2", "optimizer.direction.name": "muon",
             "optimizer.direction.newton_schulz.name": "measured", "optimizer.direction.newton_schulz.choose_at": "99999"},
            ["optimizer.schedule.final", "optimizer.direction.newton_schulz.choose_at"],
        ),
        (
            {"optimizer.direction.name": "muon", "optimizer.direction.rest.b1": "2", "optimizer.direction.coefficients": "you5",
             "optimizer.direction.iterations": "3"},
            ["optimizer.direction.rest.b1", "optimizer.direction.iterations"],
        ),
        (
            {"optimizer.direction.learning_rate": "-1", "optimizer.direction.schedule.name": "cosine",
             "optimizer.direction.schedule.warmup": "9999"},
            ["optimizer.direction.learning_rate", "optimizer.direction.schedule.warmup"],
        ),
        ({"mesh.tensor": "x", "mesh.data": "0"}, ["mesh.tensor", "mesh.data"]),
    ],
)  # fmt: skip
def test_one_mistake_does_not_hide_another(write, changes, paths):
    text = fails(write(BASE), *changes.items())
    for path in paths:
        assert f"\n  {path} = " in text or f"\n  {path}\n" in text, text


def test_choosing_another_component_says_what_no_longer_applies(write):
    loaded = load(write(BASE), [("optimizer.direction.name", "muon")])
    assert loaded.config.optimizer.direction.name == "muon"
    note = " ".join(loaded.notes)
    assert "no longer applies: b2=0.99" in note and "kept from the config: learning_rate=0.001" in note


def test_what_the_same_command_line_replaces_is_not_called_kept(write):
    changes = [("optimizer.direction.name", "muon"), ("optimizer.direction.learning_rate", "0.01")]
    loaded = load(write(BASE), changes)
    assert loaded.config.optimizer.direction.learning_rate == 0.01
    assert "no longer applies: b2=0.99" in " ".join(loaded.notes) and "kept" not in " ".join(loaded.notes)
    muon = BASE.replace('name="adamw", learning_rate=1e-3, b2=0.99', 'name="muon", rest=dict(name="adamw", b1=0.8, b2=0.99)')
    changes = [("optimizer.direction.name", "normuon"), ("optimizer.direction.rest.b2", "0.9")]
    (note,) = load(write(muon), changes).notes
    assert note.endswith("kept from the config: rest={'b1': 0.8, 'name': 'adamw'}")


def test_choosing_another_component_revalidates_its_fields(write):
    text = fails(write(BASE), ("optimizer.direction.name", "muon"), ("optimizer.direction.b2", "0.9"))
    assert "optimizer.direction.b2" in text and "it is a field of adamw" in text
    assert load(write(BASE), [("optimizer.direction.rest.b2", "0.9"), ("optimizer.direction.name", "muon")])


def test_an_override_without_a_config_explains_itself():
    with pytest.raises(ConfigError, match="--config.x=1 overrides a field of a config, but there is no config"):
        parse(["--config.x=1"])


def test_a_flag_that_is_given_twice_is_refused():
    with pytest.raises(ConfigError, match="--config is given twice, as a.py and as b.py"):
        parse(["--config", "a.py", "--config=b.py"])
    assert parse(["--config=a.py", "--config=a.py", "--config.seed=1", "--config.seed=2"]).values == {"config": "a.py"}


@pytest.mark.parametrize("text", ["²", "-1", "1.5", "", "1" * 5000])
def test_a_number_of_processes_is_a_whole_number(text):
    with pytest.raises(ConfigError, match="--process_count = .*expected a whole number"):
        _whole(parse(["--config=a.py", f"--process_count={text}"]), "process_count")


def test_unknown_flags_are_listed_with_suggestions():
    with pytest.raises(ConfigError, match="did you mean --workdir"):
        parse(["--config", "x", "--workdri=3"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def get_config(arg=''):\n    return 1 / 0\n", "x.py:2 raised ZeroDivisionError"),
        ("def get_config(:\n", "x.py:1 raised SyntaxError"),
        ("import sys\nsys.exit(3)\n", "raised SystemExit"),
        ("x = 1\n", "defines no function get_config"),
        ("def get_config(arg=''):\n    return 3\n", "returned int"),
        ("def get_config():\n    return dict(model=dict(width=object()))\n", "not data"),
    ],
)
def test_a_config_that_raises_is_one_sentence(write, text, words):
    assert words in fails(write(text))


def test_missing_files_suggest_neighbours(write, tmp_path):
    write(BASE, "tiny.py")
    assert "did you mean" in fails(str(tmp_path / "tinny.py"))
    assert "does not exist" in fails(str(tmp_path / "elsewhere" / "q.py"))


def test_a_directory_is_no_config_but_that_of_a_run_has_one(write, tmp_path):
    assert fails(str(tmp_path)) == f"config file {tmp_path} is a directory; give a .py file with get_config in it"
    own = write(canonical_json(load(write(BASE)).config), "config.json")
    assert fails(str(tmp_path)).endswith(f"is a directory; the config of the run there is {own}")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "a config is a dict or ConfigDict with the fields of a run, not NoneType"),
        ([1], "a config is a dict or ConfigDict with the fields of a run, not list"),
        (3, "not int"),
        ("configs/tiny.py", r"of a file it is trainer\.config\.load\('configs/tiny\.py'\)\.config"),
        (Path("configs/tiny.py"), r"trainer\.config\.load\('configs/tiny\.py'\)\.config"),
    ],
)
def test_what_is_no_config_is_refused_in_python(given, words):
    with pytest.raises(ConfigError, match=words):
        configuration.resolve_config(given)


def test_print_config_is_runnable_and_a_fixed_point(write, root):
    command = [sys.executable, "-m", "trainer", "--print_config", "--config"]
    once = subprocess.run([*command, write(BASE)], cwd=root, capture_output=True, check=True).stdout
    twice = subprocess.run([*command, write(once.decode(), "x.json")], cwd=root, capture_output=True, check=True)
    assert twice.stdout == once and twice.stderr == b""


def test_validation_imports_no_jax(write, root):
    script = (
        "import sys; from trainer.cli import main\n"
        "for flag in ('--validate', '--print_config'):\n    main(['--config', sys.argv[1], flag])\n"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('jax', 'flax', 'optax', 'orbax', 'grain')], 'imports JAX'"
    )
    subprocess.run([sys.executable, "-c", script, write(BASE)], cwd=root, check=True, capture_output=True)


def test_an_archive_of_an_older_version_lists_every_default_added_since(write):
    tree = json.loads(canonical_json(load(write(BASE)).config))
    del tree["model"]["logit_softcap"], tree["train"]["skip_limit"], tree["optimizer"]["schedule"]["final"]
    loaded = load(write(json.dumps(tree), "config.json"))
    assert len(loaded.notes) == 1
    for line in ("model.logit_softcap = null", "train.skip_limit = 20", "optimizer.schedule.final = 0.1"):
        assert line in loaded.notes[0]
    assert load(write(BASE)).notes == ()


def test_what_is_given_here_is_not_listed_as_an_older_versions(write):
    tree = json.loads(canonical_json(load(write(BASE)).config))
    del tree["model"]["logit_softcap"]
    archive = write(json.dumps(tree), "config.json")
    for change in (("data", '{"name": "recall"}'), ("data.name", "recall"), ("mesh", '{"data": 2}')):
        note = " ".join(load(archive, [change]).notes)
        assert "model.logit_softcap = null" in note and "data.pairs" not in note and "mesh.fsdp" not in note, change


def test_derived_sizes_follow_the_width(write):
    for width in (64, 128, 256):
        assert load(write(BASE), [("model.width", str(width))]).config.model.head_units == width // 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([("model.heads", "5")], "5 heads do not divide width 64"),
        ([("model.layers", "1e12")], "at most 100,000"),  # checked before anything is planned for every layer
        ([("model.width", "1_000_000_000_039")], "at most 1,000,000"),
        ([("model.kv_heads", "3")], "do not divide 4 query heads"),
        ([("data.batch_size", "6"), ("mesh.data", "4")], "do not divide over mesh.data x mesh.fsdp = 4"),
        ([("train.accumulation", "3")], "3 micro-batches do not divide data.batch_size 16"),
        ([("mesh.data", "0")], "at least one device"),
        ([("log.profile", "3")], "expected two steps"),
        ([("init_from.step", "4")], "there is no run to take it from: give init_from.run"),
        ([("train.teacher.step", "4")], "there is no run to take it from: give train.teacher.run"),
        ([("optimizer.sampling.name", "drop_muon"), ("model.tie_embeddings", "true")], "needs a head of its own"),
        ([("model.mixer.name", "hybrid")], "a hybrid lists at least one mixer"),
        ([("model.mixer.name", "hybrid"), ("model.mixer.pattern", "[]")], "a hybrid lists at least one mixer"),
        (
            [("model.mixer.name", "hybrid"), ("model.mixer.pattern", '[{"name": "hybrid"}]')],
            "a hybrid lists at least one mixer",
        ),
    ],
)
def test_impossible_combinations_are_refused(write, changes, words):
    assert words in fails(write(BASE), *changes)


def test_plugins_register_components_and_are_checked_alike(write, tmp_path, monkeypatch):
    (tmp_path / "my_parts_for_test.py").write_text(
        "from strata import option, options, register\n"
        "@register('model.norm', 'mine_for_test', implementation='models.layers.norm:RMSNorm')\n@options\nclass Mine:\n"
        "    epsilon: float = option(1e-3, 'small', above=0)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    plugin = ("plugins", "my_parts_for_test")
    assert load(write(BASE), [plugin, ("model.norm.name", "mine_for_test")]).config.model.norm.epsilon == 1e-3
    assert "model.norm.epsilon" in fails(write(BASE), plugin, ("model.norm.name", "mine_for_test"), ("model.norm.epsilon", "0"))
    (tmp_path / "my_exit_for_test.py").write_text("import sys\nsys.exit(0)\n")
    assert "importing my_exit_for_test raised SystemExit" in fails(write(BASE), ("plugins", "my_exit_for_test"))
    assert "importing no_such_module raised" in fails(write(BASE), ("plugins", "no_such_module"))
    for number in ("9", "[9]"):
        assert "importing" not in (problem := fails(write(BASE), ("plugins", number))) and "expected a string" in problem


def test_nothing_in_a_run_directory_is_imported(write, tmp_path, monkeypatch):
    """Started within it, Python has it on its path."""
    tree = json.loads(canonical_json(load(write(BASE)).config)) | {"plugins": ["left_in_a_run"]}
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), str(tmp_path / "elsewhere"), *sys.path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "left_in_a_run.py").write_text("raise SystemExit('executed')\n")
    assert "executed" in fails(write(json.dumps(tree), "config.json"))  # a config alone is the user's own
    (tmp_path / "environment.json").write_text("{}")
    assert "No module named 'left_in_a_run'" in fails(str(tmp_path / "config.json"))


def test_the_run_id_is_the_hash_of_semantic_keys_and_the_seed(write):
    def config(*changes):
        return load(write(BASE), changes).config

    base = config()
    assert run_id(base) == f"{config_hash(base)}-s0"
    assert run_id(config(("seed", "3"))) == f"{config_hash(base)}-s3"
    other = {"mesh.data": "2", "train.remat": "full", "log.every": "7", "checkpoint.keep_latest": "5", "data.workers": "2"}
    for change in other.items():
        assert config_hash(config(change)) == config_hash(base), change
    for change in (("model.width", "128"), ("train.steps", "7"), ("train.precision", "bfloat16"), ("data.seed", "0")):
        assert config_hash(config(change)) != config_hash(base), change


def test_steps_belong_to_the_id_only_where_the_schedule_depends_on_them(write):
    constant = ("optimizer.schedule.name", "constant")
    short, long = (load(write(BASE), [constant, ("train.steps", steps)]).config for steps in ("10", "20"))
    assert run_id(short) == run_id(long)


def test_compare_gives_key_classes(write):
    one, two = load(write(BASE)).config, load(write(BASE), [("mesh.data", "2"), ("model.norm.name", "layer_norm")]).config
    found = {difference.path: difference.key for difference in compare(one, two)}
    assert found["mesh.data"] == "execution" and found["model.norm.name"] == "semantic" and "model.norm.bias" in found


def test_every_config_in_the_repository_is_valid_and_says_how_to_run_it(root):
    paths = sorted((root / "configs").glob("[!_]*.py"))
    assert paths
    for path in paths:
        loaded = configuration.load(str(path))
        assert loaded.config and f"configs/{path.name}" in path.read_text().split('"""')[1]


def test_fields_lists_the_whole_tree_and_any_part():
    from trainer.config.fields import describe_fields

    assert "train.steps: an integer, at least 1, default 1000 [semantic]" in describe_fields()
    assert "optimizer.direction.muon" in describe_fields("optimizer.direction")
    assert describe_fields("optimizer.schedule.wsd.decay").startswith("  optimizer.schedule.wsd.decay: a number, at least 0")
    assert describe_fields("train.steps").startswith("  train.steps: an integer")
    with pytest.raises(ConfigError, match="the fields are"):
        describe_fields("model.nothing")
