"""The package as others see it: a fast import, its names, and nothing that the original stumbled over."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tav_model

ROOT = Path(tav_model.__file__).parent
SLOW = ("torch", "diffusers", "transformers", "numpy", "mlflow", "dvc", "prefect")
PUBLIC = ("UNet3DConditionModel", "TuneAVideoPipeline", "ddim_inversion", "Tuner", "TuningConfig", "TavError")


def imported_modules(code: str) -> set[str]:
    """The top packages that are loaded in a fresh interpreter after `code`."""
    script = f"{code}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def imports_of(path: Path) -> set[str]:
    """The top packages that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def test_import_loads_nothing_slow():
    assert not imported_modules("import tav_model; dir(tav_model)") & set(SLOW)


def test_the_error_loads_nothing_slow():
    assert not imported_modules("from tav_model import TavError") & set(SLOW)


def test_every_public_name_is_there():
    assert set(PUBLIC) <= set(tav_model.__all__) <= set(dir(tav_model))
    for name in tav_model.__all__:
        assert getattr(tav_model, name).__name__ == name


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="UNet4D"):
        tav_model.UNet4D  # noqa: B018


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_library_serves_alone(path):
    forbidden = {"tav_cli", "flows", "tasks", "tav", "toyworld", "prefect", "dvc", "mlflow", "tests"}
    assert not imports_of(path) & forbidden


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_xformers(path):
    assert "xformers" not in imports_of(path)


def test_xformers_is_not_loaded_by_the_whole_library():
    assert all(getattr(tav_model, name) for name in tav_model.__all__)
    assert "xformers" not in sys.modules
