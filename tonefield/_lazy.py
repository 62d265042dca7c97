"""Public names that are imported when they are first used, so that `import tonefield` costs next to nothing."""

import importlib


def attach(package: str, modules_by_name: dict[str, str]):
    """`__getattr__`, `__dir__` and `__all__` (PEP 562) of a package that exports `modules_by_name`."""

    def __getattr__(name: str):
        if name not in modules_by_name:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{modules_by_name[name]}"), name)

    def __dir__():
        return sorted(modules_by_name)

    return __getattr__, __dir__, sorted(modules_by_name)
