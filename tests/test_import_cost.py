"""`import tonefield` and `--help` load nothing heavy, and the lazy names are real."""

import ast
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import tonefield


ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "diffusers", "librosa", "transformers", "matplotlib", "datasets"}
LAZY_PACKAGES = [init.parent.name for init in sorted(ROOT.glob("*/__init__.py")) if "attach(" in init.read_text()]
IMPORTERS = [
    f"conversion/{file.stem}" for file in (ROOT / "conversion").glob("*.py") if "__main__" in file.read_text()
]

IMPORTED = "; import json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
HELP = """
import json, runpy, sys
script = sys.argv[1]
sys.argv = [script, "--help"]
try:
    runpy.run_path(script, run_name="__main__")
    status = "no exit"
except SystemExit as exit:
    status = exit.code or 0
print(json.dumps([status, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def scripts():
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SCRIPTS":
            return ast.literal_eval(node.value)
    raise LookupError("SCRIPTS")


def last_line(*arguments):
    result = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout, json.loads(result.stdout.splitlines()[-1])


def module_of(folder):
    return importlib.import_module("tonefield" if folder == "tonefield" else f"tonefield.{folder}")


# `schedulers` holds functions that are named like their module, which cannot be lazy: it needs torch.
@pytest.mark.parametrize("folder", [folder for folder in LAZY_PACKAGES if folder != "schedulers"])
def test_import_loads_nothing_heavy(folder):
    name = "tonefield" if folder == "tonefield" else f"tonefield.{folder}"
    _, modules = last_line("-c", f"import {name}" + IMPORTED)
    assert "tonefield" in modules
    assert not (HEAVY | {"numpy"}) & set(modules)


@pytest.mark.parametrize("script", [*scripts(), *IMPORTERS])
def test_help_loads_nothing_heavy(script):
    output, (status, modules) = last_line("-c", HELP, str(ROOT / f"{script}.py"))
    assert status == 0
    assert "usage:" in output
    assert not HEAVY & set(modules)


@pytest.mark.parametrize("folder", LAZY_PACKAGES)
def test_every_public_name_is_a_class_or_a_function(folder):
    module = module_of(folder)
    assert dir(module) == sorted(module.__all__) != []
    for name in dir(module):
        value = getattr(module, name)
        assert inspect.isclass(value) or inspect.isfunction(value), name
        assert value.__name__ == name


@pytest.mark.parametrize("folder", LAZY_PACKAGES)
def test_type_checkers_see_the_public_names(folder):
    tree = ast.parse((ROOT / folder / "__init__.py").read_text())
    static = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    lazy = [alias.asname for block in static for node in block.body for alias in node.names]
    eager = [
        alias.name for node in tree.body if isinstance(node, ast.ImportFrom) and node.level for alias in node.names
    ]
    assert sorted({*lazy, *eager} - {"attach"}) == dir(module_of(folder))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'tonefield' has no attribute 'MelSpectogram'"):
        tonefield.MelSpectogram  # noqa: B018
