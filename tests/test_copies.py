"""A model or scheduler travels as one file, so some functions stand in several. They must not drift apart."""

import importlib
import inspect
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
COPIES = [
    (f"tonefield.{path.parent.name}.{path.stem}", original, name)
    for folder in ("models", "schedulers")
    for path in sorted((ROOT / folder).glob("*.py"))
    for original, name in re.findall(r"^# Copied from ([\w.]+)\.(\w+)$", path.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize(("module", "original", "name"), COPIES)
def test_copies_are_copies(module, original, name):
    copy, source = (inspect.getsource(getattr(importlib.import_module(place), name)) for place in (module, original))
    assert copy == source


def test_there_are_copies():
    assert len(COPIES) >= 12
