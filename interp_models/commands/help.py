"""The text of `--help`: the keys of the config, and the registered classes that the user asks for."""

import dataclasses
import importlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from interp_models.config.describe import describe
from interp_models.config.shipped import first_comment, shipped
from interp_models.core.discovery import registered
from interp_models.core.errors import unknown
from interp_models.core.plugins import import_plugins, imported, installed
from interp_models.core.registry import Registry
from interp_models.core.schema import schema_of


class Topic(NamedTuple):
    """A topic of `--help`: the classes of a registry."""

    key: str
    """Config key that names the classes."""
    package: str
    """Package with the registry and its classes."""
    variable: str
    """Name of the registry."""
    given: tuple[str, ...]
    """Parameters of the constructors that are not options, because the program passes them."""

    @property
    def registry(self) -> Registry[Any]:
        """The registry; imports its package."""
        return getattr(importlib.import_module(self.package), self.variable)  # type: ignore[no-any-return]

    def names(self) -> list[str]:
        """The names that the files of the package register; nothing is imported."""
        return sorted(entry.name for entry in registered(self.package) if entry.registry == self.variable)

    def keys(self) -> dict[str, str]:
        """The registered name of the class by its keys, such as those of metrics; nothing is imported."""
        own = [entry for entry in registered(self.package) if entry.registry == self.variable]
        return {key: entry.name for entry in own for key in entry.keys}


TOPICS = {
    "data": Topic("data.dataset.name", "interp_models.data", "DATASETS", ("split",)),
    "transforms": Topic("data.transforms.name", "interp_models.data.transforms", "TRANSFORMS", ("size",)),
    "models": Topic("model.name", "interp_models.models", "MODELS", ("num_classes",)),
    "explainers": Topic("explainers", "interp_models.explainers", "EXPLAINERS", ("model",)),
    "metrics": Topic("metrics", "interp_models.metrics", "METRICS", ("preset", "grid", "max_steps", "batch")),
    "prototype_metrics": Topic(
        "prototype_metrics", "interp_models.metrics", "PROTOTYPE_METRICS", ("model", "part_names")
    ),
    "userstudy": Topic("userstudy", "interp_models.userstudy", "TASKS", ("pool", "draw")),
}


def help_text(usage: str, schema: type, topics: Sequence[str] = (), plugins: Sequence[str] = ()) -> str:
    """The text of `--help`: usage, keys and registered names, or details of the topics that are asked for.

    Args:
        usage: how the command is called.
        schema: the dataclass of its config.
        topics: keys of `TOPICS`, names of registered classes, keys of the config, or names of shipped configs.
        plugins: files and packages to import first; their classes are topics too.
    """
    if topics:
        import_plugins(plugins)
        return "\n\n".join(_about(topic, schema) for topic in topics)
    lines = [usage.strip(), "\nKeys (key=value, lists as phases[0].epochs=1):", describe(schema)]
    lines.append("\nNames; --help NAME shows the options of one, --help models those of all models:")
    for name, topic in TOPICS.items():
        lines.append(f"  {name}: {', '.join(topic.names())}")
    if installed():
        lines.append(f"  and the names of these installed plugins: {', '.join(installed())}")
    return "\n".join(lines)


def _about(name: str, schema: type) -> str:
    """The help on one topic."""
    keys = [field.name for field in dataclasses.fields(schema)]
    if name in TOPICS:
        topic = TOPICS[name]
        parts = [f"data.\n{describe(schema_of(_data_module()))}"] if name == "data" else []
        return "\n\n".join(parts + [_about_class(topic, one, brief=True) for one in topic.registry.names()])
    if name == "networks" and name in keys:
        from interp_models.runs.networks import NetworkConfig

        return f"{describe(schema, only=name)}\n\nKeys of a network:\n{describe(NetworkConfig)}"
    if name in keys:
        return describe(schema, only=name)
    metrics = TOPICS["metrics"].keys()
    name = metrics.get(name, name)
    for topic in TOPICS.values():
        if name in topic.names() or (_plugged() and name in topic.registry):
            return _about_class(topic, name)
    if (path := shipped(Path(name))) is not None:
        return f"{path}\n{first_comment(path)}"
    names = [one for topic in TOPICS.values() for one in topic.names()]
    raise unknown("topic of --help", name, dict.fromkeys([*TOPICS, *keys, *names, *metrics]))


def _plugged() -> bool:
    """Whether there are plugins, which may register further classes."""
    return bool(installed() or imported())


def _about_class(topic: Topic, name: str, *, brief: bool = False) -> str:
    """Description and options of a registered class."""
    cls = topic.registry.get(name)
    text = inspect.getdoc(cls) or ""
    text = text.partition("\n\n")[0] if brief else text
    lines = [
        f"{topic.key}: {name} ({cls.__module__}.{cls.__name__})",
        *(f"  {line}".rstrip() for line in text.split("\n")),
    ]
    if legend := getattr(cls, "legend", None):
        lines += [f"  {key}: {meaning}" for key, meaning in legend.items()]
    noted = cls if hasattr(cls, "__dataclass_fields__") else None  # others have them in their docstring
    if options := describe(schema_of(cls, topic.given), "    ", noted=noted):
        lines += ["  Options:", options]
    if actions := getattr(cls, "actions", ()):
        lines.append(f"  Actions of phases[i].on_start and on_end: {', '.join(actions)}")
    return "\n".join(lines)


def _data_module() -> type:
    """The class whose options are the keys below `data`."""
    from interp_models.data.module import DataModule  # loads Lightning and torchvision

    return DataModule
