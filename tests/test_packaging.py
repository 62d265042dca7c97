"""The package as a clone, an editable install, a wheel and an sdist: what is in it, and that its scripts start."""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import tonefield


ROOT = Path(__file__).resolve().parents[1]
LAUNCH = "accelerate.commands.accelerate_cli launch --num_processes 1 --num_machines 1".split()
LAUNCH += "--mixed_precision no --dynamo_backend no".split()


def setup_constant(name):
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise LookupError(name)


FOLDERS, SCRIPTS = setup_constant("FOLDERS"), setup_constant("SCRIPTS")


def run(*command, cwd):
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    result = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{command} exits with {result.returncode}:\n{result.stdout}\n{result.stderr}"
    return result.stdout


def copy_checkout(to):
    ignored = (".*", "build", "dist", "demo", "outputs", "*.egg-info", "__pycache__")
    return Path(shutil.copytree(ROOT, to, ignore=shutil.ignore_patterns(*ignored)))


def make_environment(path):
    """An environment with this one's packages but without tonefield, and its interpreter.

    Python reads no `.pth` files in a folder that a `.pth` file adds, so an editable install stays unseen.
    """
    run(sys.executable, "-m", "venv", "--without-pip", path, cwd=path.parent)
    python = path / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=path.parent).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    hidden = run(python, "-c", "import importlib.util as i; print(i.find_spec('tonefield'))", cwd=path.parent)
    assert hidden.strip() == "None", f"tonefield is seen in an environment that should be without it: {hidden}"
    return python


def install(python, target, *options):
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-build-isolation")
    run(*pip, "--no-index", *options, target, cwd=python.parent)


def module_file(python, module, cwd):
    return Path(run(python, "-c", f"import {module} as m; print(m.__file__)", cwd=cwd).strip())


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    return tmp_path_factory.mktemp("packaging")


@pytest.fixture(scope="session")
def clean_python(workspace):
    return make_environment(workspace / "clean")


@pytest.fixture(scope="session")
def checkout(workspace):
    return copy_checkout(workspace / "my-checkout")


@pytest.fixture(scope="session")
def wheel(workspace):
    source = copy_checkout(workspace / "wheel-source")
    run(
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--wheel",
        "--outdir",
        workspace / "wheel",
        source,
        cwd=workspace,
    )
    return next((workspace / "wheel").glob("*.whl"))


@pytest.fixture(scope="session")
def wheel_python(workspace, wheel):
    python = make_environment(workspace / "installed")
    install(python, wheel)
    return python


@pytest.fixture(scope="session")
def elsewhere(workspace):
    (workspace / "elsewhere").mkdir()
    return workspace / "elsewhere"


def test_every_folder_and_script_is_listed_in_setup():
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tonefield", "tests"}
    scripts = {path.stem for path in ROOT.glob("*.py")} - {"setup"}
    assert set(FOLDERS) == folders
    assert set(SCRIPTS) == scripts


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(contents(wheel))
    expected = {f"tonefield/{path.name}" for path in (ROOT / "tonefield").glob("*.py")} | {"tonefield/py.typed"}
    expected |= {f"tonefield/{path.relative_to(ROOT)}" for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    expected |= {f"tonefield/{name}.py" for name in SCRIPTS}
    expected |= {f"tonefield/{path.relative_to(ROOT)}" for path in (ROOT / "evaluation" / "pages").iterdir()}
    expected |= {f"tonefield/page/{path.name}" for path in (ROOT / "tonefield" / "page").iterdir()}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_wheel_carries_the_version_of_the_package(wheel):
    assert wheel.name == f"tonefield-{tonefield.__version__}-py3-none-any.whl"


def test_sdist_builds_the_same_wheel(workspace, checkout, wheel):
    source = copy_checkout(workspace / "sdist-source")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", workspace / "sdist", source, cwd=workspace)
    with tarfile.open(next((workspace / "sdist").glob("*.tar.gz"))) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "constraints.txt", "tests/test_packaging.py"} <= packed
    assert contents(next((workspace / "sdist").glob("*.whl"))) == contents(wheel)


def test_fresh_clone(clean_python, checkout):
    for folder in FOLDERS:
        assert module_file(clean_python, f"tonefield.{folder}", cwd=checkout) == checkout / folder / "__init__.py"
    for script in SCRIPTS:
        assert "usage:" in run(clean_python, f"{script}.py", "--help", cwd=checkout)


def test_editable_install(workspace, elsewhere):
    python = make_environment(workspace / "editable")
    source = copy_checkout(workspace / "editable-source")
    install(python, source, "--editable")
    for folder in FOLDERS:
        assert module_file(python, f"tonefield.{folder}", cwd=elsewhere) == source / folder / "__init__.py"
    for script in SCRIPTS:
        assert "usage:" in run(python, "-m", f"tonefield.{script}", "--help", cwd=elsewhere)


def test_installed_wheel(wheel_python, elsewhere):
    for module in ("tonefield", *(f"tonefield.{folder}" for folder in FOLDERS)):
        assert module_file(wheel_python, module, cwd=elsewhere).is_relative_to(wheel_python.parents[1])
    for script in SCRIPTS:
        assert "usage:" in run(wheel_python, "-m", f"tonefield.{script}", "--help", cwd=elsewhere)


# `accelerate launch` imports torch, which takes seconds: one script stands for all.
def test_accelerate_launches_a_script_by_path(clean_python, checkout):
    assert "usage:" in run(clean_python, "-m", *LAUNCH, f"{SCRIPTS[0]}.py", "--help", cwd=checkout)


def test_accelerate_launches_a_module(wheel_python, elsewhere):
    assert "usage:" in run(wheel_python, "-m", *LAUNCH, "-m", f"tonefield.{SCRIPTS[0]}", "--help", cwd=elsewhere)
