"""Resolve a plan: explainers with all options, metrics, and the grid of the maps."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from interp_models.core.digests import code_digest
from interp_models.core.distributed import is_first
from interp_models.core.errors import InputError, NotApplicable, unknown
from interp_models.core.modes import evaluating
from interp_models.core.prepared import class_name, unwrapped
from interp_models.evaluation.config import ExplanationConfig
from interp_models.explainers.base import EXPLAINERS
from interp_models.explainers.cam import ActivationMap
from interp_models.metrics.base import METRICS, Grid, MapMetric, metrics_of
from interp_models.metrics.presets import PRESETS

DEFAULT_CELLS = 7
"""Rows and columns of the grid for a network without a feature map: those of most CNNs for images of 224 pixels."""
Spec = tuple[str, str, dict[str, Any]]
"""Label, name and all options of an explainer."""


def explainer_specs(items: Sequence[Any]) -> list[Spec]:
    """Label, name and all options (with defaults) of the explainers of a config.

    Args:
        items: names, patterns such as `smooth*`, or mappings with `name`, options and an optional `label`.

    Raises:
        InputError: for an unknown explainer, an item of another type, or a label that occurs twice.
    """
    specs: list[Spec] = []
    for item in expanded(items):
        node = {"name": item} if isinstance(item, str) else item
        if not isinstance(node, dict) or not isinstance(node.get("name"), str):
            raise InputError(f"an explainer is a name, or a mapping with 'name' and options; got {item!r}")
        options = {key: value for key, value in node.items() if key not in ("name", "label")}
        options = EXPLAINERS.options(node["name"], options, given=("model",))
        label = str(node.get("label", node["name"]))
        if "/" in label or label.startswith(".") or not label:
            raise InputError(
                f"explainer label {label!r} is used as a file name; it must not have '/' or begin with '.'"
            )
        if any(label == other for other, _, _ in specs):
            raise InputError(f"explainer {label!r} is listed twice; give one of them another label")
        specs.append((label, node["name"], options))
    return specs


def has_row_per_label(plan: ExplanationConfig, label: Tensor) -> bool:
    """Whether every label of an image has a row of its own: the labels of images with several (B, K) are explained."""
    return plan.target == "label" and label.dim() == 2


def check_plan(plan: ExplanationConfig, others: Iterable[str] = ()) -> tuple[list[Spec], dict[str, str]]:
    """Check a plan.

    Args:
        plan: the plan.
        others: labels of explainers beside those of the plan.

    Returns:
        Label, name and options of every explainer, and the registered name of the metric of every key.

    Raises:
        InputError: for an unknown explainer, metric, preset, target, control or reference, for two explainers with one
            label, or if there is no explainer or no metric.
    """
    specs, keys = explainer_specs(plan.explainers), metrics_of(plan.metrics)
    if plan.target not in ("prediction", "label") and not isinstance(plan.target, int):
        raise InputError(f"target must be 'prediction', 'label' or a class number; got {plan.target!r}")
    if plan.preset not in PRESETS:
        raise unknown("preset", plan.preset, PRESETS)
    labels = [*(label for label, _, _ in specs), *others]
    if not keys or not labels:
        raise InputError("explainers and metrics: at least one of each is needed")
    if len(set(labels)) < len(labels):
        raise InputError(f"two explainers have one label: {', '.join(labels)}")
    for key, label in (("control", plan.control), ("reference", plan.reference)):
        if label is not None and label not in labels:
            raise InputError(f"{key} {label!r} is no explainer of this evaluation: {', '.join(labels)}")
    return specs, keys


def described(option: Any) -> str:
    """A function among an explainer's options, such as `reshape`, as text for tables: its module and name."""
    named = callable(option) and hasattr(option, "__qualname__")
    return f"{option.__module__}.{option.__qualname__}" if named else repr(option)


def check_written(specs: Iterable[Spec]) -> None:
    """Raise `InputError` if an option is a function: results in a folder cannot tell whether its code has changed."""
    for label, _, options in specs:
        if found := [key for key, value in options.items() if callable(value)]:
            raise InputError(
                f"explainer {label}: with folder=, {found[0]} must be text or numbers; a function works without folder="
            )


def expanded(items: Sequence[Any]) -> list[Any]:
    """Replace patterns such as `*` or `smooth*` by the registered names that match and that no other item names.

    Raises:
        InputError: for a pattern without a match.
    """
    named = [item.get("name") if isinstance(item, dict) else item for item in items]
    found: list[Any] = []
    for item in items:
        if not isinstance(item, str) or "*" not in item:
            found.append(item)
        elif EXPLAINERS.names(item):
            found += [name for name in EXPLAINERS.names(item) if name not in named and name not in found]
        else:
            raise InputError(f"no explainer matches {item!r}; known: {', '.join(EXPLAINERS)}")
    return found


def cache_keys(specs: Iterable[Spec]) -> dict[str, list[Any]]:
    """The key of each explainer's results in a cache, by label: its name, options, and the code of a plugin."""
    return {label: [name, options, code_digest(EXPLAINERS.get(name))] for label, name, options in specs}


def metric_keys(keys: Mapping[str, str]) -> list[Any]:
    """The keys of metrics, with the code of plugins, for the key of a cache.

    Args:
        keys: name of the metric class by key.
    """
    return [[key, code_digest(METRICS.get(name))] for key, name in keys.items()]


def make_metrics(plan: ExplanationConfig, keys: Mapping[str, str], grid: Grid | None) -> dict[str, MapMetric]:
    """Make the metrics of these keys with the protocol of a plan.

    Args:
        plan: the plan.
        keys: registered name of the metric by key.
        grid: grid of the maps.

    Returns:
        The metrics by their registered names.

    Raises:
        InputError: for an unknown preset, or if `max_steps` or `batch` is below 1.
    """
    options = {"preset": plan.preset, "grid": grid, "max_steps": plan.max_steps, "batch": plan.batch}
    return {
        name: METRICS.get(name)(**options, wanted=[key for key in keys if keys[key] == name])
        for name in dict.fromkeys(keys.values())
    }


def resolve_grid(grid: Any, model: nn.Module, example: Tensor) -> Grid | None:
    """The grid to which maps are brought.

    Args:
        grid: [rows, columns], `native` or None. None takes the grid of the model's own maps or, if it has none, of its
            last feature map; if no layer gives a feature map, 7 × 7 cells, and a warning says so.
        model: the model.
        example: an image (1, 3, H, W), of the same size as all images.

    Returns:
        Rows and columns; None for `native`.

    Raises:
        InputError: for any other value.
    """
    if grid == "native":
        return None
    if grid is None:
        with torch.no_grad(), evaluating(model):
            maps = getattr(model(example), "maps", None)
            if not isinstance(maps, Tensor):
                try:
                    maps = ActivationMap(model).attribute(example)
                except NotApplicable:
                    return _default_grid(model, example)
        return int(maps.shape[-2]), int(maps.shape[-1])
    if isinstance(grid, list | tuple) and len(grid) == 2 and all(isinstance(side, int) and side > 0 for side in grid):
        return int(grid[0]), int(grid[1])
    raise InputError(f"grid must be [rows, columns], 'native' or null; got {grid!r}")


def _default_grid(model: nn.Module, example: Tensor) -> Grid:
    """The grid for a network in which no layer gives a feature map."""
    rows, columns = min(DEFAULT_CELLS, example.shape[-2]), min(DEFAULT_CELLS, example.shape[-1])
    if is_first():
        warnings.warn(
            f"no layer of {class_name(unwrapped(model))} gives the grid of the maps: they are brought to {rows} x "
            f"{columns} cells; grid=[rows, columns] names others",
            stacklevel=2,
        )
    return rows, columns
