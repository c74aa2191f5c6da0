"""Deliberately wrong copies of our own modules, to show that a test can fail."""

import importlib
import sys
import types
from unittest import mock

from interp_models.core.registry import Registry


def mutated(module_name: str, right: str, wrong: str) -> types.ModuleType:
    """A copy of a module in which the one place that reads `right` reads `wrong`; it registers nothing."""
    module = importlib.import_module(module_name)
    assert module.__file__
    with open(module.__file__) as file:
        source = file.read()
    if source.count(right) != 1:  # no AssertionError: those are what callers wait for
        raise LookupError(f"{right!r} stands {source.count(right)} times in {module_name}")
    copy = types.ModuleType(module_name + "_mutated")
    copy.__file__ = module.__file__
    known = mock.patch.dict(sys.modules, {copy.__name__: copy})  # dataclasses look for it there
    with known, mock.patch.object(Registry, "register", return_value=lambda cls: cls):
        exec(compile(source.replace(right, wrong), module.__file__, "exec"), copy.__dict__)
    return copy
