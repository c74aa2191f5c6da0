"""Reads files of weights without running code from them."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from interp_models.core.errors import InputError, first_line

_MADE: tuple[Any, ...] = (np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0])
"""Functions that rebuild NumPy's numbers and arrays."""
HARMLESS: list[Any] = [
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    *(type(np.dtype(name)) for name in ("bool", "int32", "int64", "float16", "float32", "float64")),
    *((made, f"numpy.{core}.multiarray.{made.__name__}") for made in _MADE for core in ("core", "_core")),
]
"""Types that may be in a file beside tensors, such as options of a training and its accuracies. NumPy's module has had
two names."""


def read(path: Path) -> Mapping[Any, Any]:
    """Read a file of weights: `.safetensors`, or a file of `torch.save`.

    Raises:
        InputError: if the file does not exist, cannot be read without running code, or holds no mapping.
    """
    path = path.expanduser()
    if path.is_dir():
        raise InputError(f"weights file {path} is a folder")
    if not path.is_file():
        raise InputError(f"weights file {path} does not exist; expected timm, bundled, a file, or null")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            with torch.serialization.safe_globals(HARMLESS):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"weights file {path} cannot be read as tensors ({_why(path, error)})") from None
    if not isinstance(content, Mapping):
        raise InputError(f"weights file {path} must hold named tensors; it holds a {type(content).__name__}")
    return content


def _why(path: Path, error: Exception) -> str:
    """The reason why a file cannot be read."""
    try:
        with path.open("rb") as file:
            start = file.read(64).lstrip()
    except OSError:
        return first_line(error)
    if not start:
        return "it is empty"
    if start.startswith(b"<"):
        return "it is a web page: the download failed"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS: git lfs pull fetches the file"
    if "TorchScript" in str(error):
        return "it is a TorchScript archive: save torch.jit.load(FILE).state_dict()"
    try:
        with torch.serialization.safe_globals(HARMLESS):
            objects = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:
        objects = []
    if objects:
        return (
            f"it holds Python objects beside tensors, such as {objects[0]}, and reading them may run code; if you "
            "trust it, save torch.load(FILE, weights_only=False)['state_dict'] to its own file"
        )
    return first_line(error)
