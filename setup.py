"""The folders at the repository root become sub-packages of `tonefield`, the scripts beside them its modules.

Metadata and dependencies are in pyproject.toml.
"""

from setuptools import setup
from setuptools.command.build_py import build_py as _build_py


FOLDERS = ("conversion", "data", "evaluation", "models", "pipelines", "schedulers", "training")
SCRIPTS = (
    "app",
    "audio_to_images",
    "audio_to_tokens",
    "evaluate",
    "inference",
    "train_codec",
    "train_sedd",
    "train_unet",
    "train_vae",
)


class build_py(_build_py):
    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        if package == "tonefield":
            modules += [(package, name, f"{name}.py") for name in SCRIPTS]
        return modules


setup(
    packages=["tonefield", *(f"tonefield.{name}" for name in FOLDERS)],
    package_dir={"tonefield": "tonefield", **{f"tonefield.{name}": name for name in FOLDERS}},
    package_data={"tonefield": ["page/*"], "tonefield.evaluation": ["pages/*"]},
    include_package_data=False,
    cmdclass={"build_py": build_py},
)
