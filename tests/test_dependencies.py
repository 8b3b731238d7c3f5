"""What Strata takes from other packages: public names only, and versions that were tested."""

import ast
import re
import tomllib

import pytest

PACKAGES = ("strata", "models", "optim", "kernels", "trainer", "configs", "experiments", "benchmarks")
OWN = {*PACKAGES, "__future__"}
SHIM = "kernels/mosaic_gpu/interpreter.py"


def private_names(source: str) -> list[str]:
    """Private modules and names of other packages that a module imports, reaches through an attribute, or has in a string."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and node.attr == "_src":
            names = [ast.unparse(node)]
        elif isinstance(node, ast.Constant) and re.fullmatch(r"[a-z]\w*(\.\w+)*\._src(\.\w+)*", str(node.value)):
            names = [node.value]  # of importlib.import_module, or of a lookup in sys.modules
        else:
            continue
        found += [name for name in names if name.split(".")[0] not in OWN and re.search(r"\._(?!_)", name)]
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import jax._src.core",
        "from jax._src import core",
        "def late():\n    from jax import _src",
        "from numpy._core import multiarray",
        "import jax\ncore = jax._src.core",
        "import importlib\nimportlib.import_module('jax._src.core')",
    ],
)
def test_a_private_name_is_found_however_it_is_reached(source):
    assert private_names(source)
    assert not private_names(source.replace("_src", "src").replace("_core", "core"))


def test_what_jax_keeps_private_is_touched_in_one_file(root):
    files = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    assert len(files) > 100
    found = {path.relative_to(root).as_posix(): names for path in files if (names := private_names(path.read_text()))}
    assert found == {SHIM: ["jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks"]}


def test_every_package_that_the_tests_need_is_pinned_once_a_python(root):
    def package(line: str) -> str:
        return re.split(r"[\s=<>\[;]", line, maxsplit=1)[0].lower().replace("_", "-")

    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    needed = {package(line) for line in project["dependencies"] + project["optional-dependencies"]["test"]} | {"jaxlib"}
    lines = [line for line in (root / "constraints.txt").read_text().splitlines() if line[:1] not in ("", "#")]
    for version in ("<", ">="):
        pins = [line for line in lines if ";" not in line or f'python_version {version} "3.12"' in line]
        assert sorted(map(package, pins)) == sorted(needed)  # none twice
        assert all(re.match(r"[\w-]+==[\w.]+(;|$)", pin) for pin in pins)
