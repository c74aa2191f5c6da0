"""Values as written in yaml and on the command line. The schema decides what they mean.

`007`, `1e3`, `on` and `null` are text if the schema expects text; else they are two numbers, a boolean and None. A
leading `~` of a path is a home folder.
"""

import os
import re
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import yaml

from interp_models.core.errors import InputError

PathText = Annotated[str, "path"]
"""Type of an option that is a path: a leading `~` becomes the home folder."""
OptionsOf = Annotated[dict[str, Any], "options"]
"""Type of an option that holds a name and the options of the named class; the class has the schema."""
ListOfOptions = Annotated[list[Any], "options"]
"""Type of an option that is a list of such options."""


class Written(str):
    """An unquoted yaml scalar or a value of the command line, whose type depends on the schema."""


class _Loader(yaml.SafeLoader):
    """A yaml loader that reads quoted scalars and keys as text and other scalars as text or `Written`.

    It refuses a key that is given twice.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value}", key.start_mark)
                seen.add(key.value)
        mapping = super().construct_mapping(node, deep)
        return {str(key) if isinstance(key, str) else key: value for key, value in mapping.items()}

    def construct_plain(self, node: yaml.ScalarNode) -> Any:
        """Construct a scalar of any kind."""
        if node.style is not None:
            return node.value
        if node.tag != self.resolve(yaml.ScalarNode, node.value, (True, False)):  # type: ignore[no-untyped-call]
            # The scalar has an explicit tag.
            return yaml.SafeLoader.yaml_constructors[node.tag](self, node)
        return node.value if isinstance(_meaning(node.value), str) else Written(node.value)


for _tag in ("bool", "float", "int", "null", "str", "timestamp"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_plain)


def _meaning(scalar: str) -> Any:
    """The value of an unquoted scalar that is not meant as text: as OmegaConf reads it, without two traps of yaml."""
    from omegaconf import OmegaConf  # not needed for explainers and metrics that are built in Python
    from omegaconf.errors import OmegaConfBaseException

    if ":" in scalar or "${" in scalar:  # yaml reads 1:30 as 90
        return scalar
    if re.fullmatch(r"[-+]?0[0-9_]+", scalar):  # yaml reads 010 as 8
        return int(scalar)
    try:
        return OmegaConf.from_dotlist([f"value={scalar}"])["value"]
    except (yaml.YAMLError, OmegaConfBaseException):
        return scalar


def read(text: str) -> Any:
    """Parse yaml; scalars that may be something else than text become `Written`. Errors of yaml are raised."""
    return yaml.load(text, Loader=_Loader)  # a safe loader


def given(argument: str) -> Any:
    """Read a value of the command line: text, or `Written` if it may be something else than text.

    >>> given("a b"), given("'007'")
    ('a b', '007')
    >>> isinstance(given("007"), Written), isinstance(given("[a, b]"), Written)
    (True, True)
    """
    argument = argument.strip()
    scalar = _scalar(argument)
    if scalar is not None and scalar.style is not None:
        return scalar.value
    try:
        value = read(argument)
    except yaml.YAMLError:
        return Written(argument)
    if "${" in argument:  # an interpolation is refused later
        return value if isinstance(value, dict | list) else argument
    return argument if type(value) is str and value == argument else Written(argument)


def _scalar(text: str) -> yaml.ScalarNode | None:
    """The yaml scalar of a text; None if the text is not a single scalar."""
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError:
        return None
    return node if isinstance(node, yaml.ScalarNode) else None


def value_of(written: Written) -> Any:
    """The value of a `Written` that is not meant as text; items of lists and mappings can again be `Written`.

    >>> [value_of(Written(text)) for text in ("007", "0x10", "1e3", "on", "null", "1:30", "3 # x")]
    [7, 16, 1000.0, True, None, '1:30', '3 # x']
    >>> value_of(Written("{a: [b, 1]}"))
    {'a': ['b', '1']}

    Raises:
        InputError: if it is not valid yaml.
    """
    try:
        value = read(written)
    except yaml.YAMLError as error:
        raise InputError(f"{str(written)!r} is not valid yaml: {getattr(error, 'problem', error)}") from None
    if isinstance(value, dict | list) or not written:
        return value
    scalar = _scalar(written)
    if scalar is None or (scalar.style is None and scalar.value != written):
        return str(written)  # yaml would cut it at a #
    return _meaning(value) if isinstance(value, Written) else value


def text_of(written: Any) -> str:
    """The value of a `Written` as text, without quotes."""
    scalar = _scalar(written) if isinstance(written, Written) else None
    return str(written) if scalar is None or scalar.style is None else str(scalar.value)


def values(node: Any) -> Any:
    """Replace all `Written` values in a tree by their values, without a schema.

    >>> values({"a": [Written("007"), "007"]})
    {'a': [7, '007']}
    """
    if isinstance(node, Written):
        return values(value_of(node))
    if isinstance(node, Mapping):
        return {key: values(value) for key, value in node.items()}
    return [values(value) for value in node] if isinstance(node, list | tuple) else node


def is_open(hint: Any) -> bool:
    """Whether a type is `OptionsOf` or `ListOfOptions`, whose schema belongs to another class."""
    return "options" in getattr(hint, "__metadata__", ())


def typed(hint: Any, value: Any) -> Any:
    """Resolve `Written` values and paths by the type that the schema expects; types are checked elsewhere.

    >>> typed(str, Written("007")), typed(str | None, Written("null")), typed(int, Written("010"))
    ('007', None, 10)
    >>> typed(list[str], Written("[1, on, 'a b']")), typed(Literal["on", "off"], Written("on"))
    (['1', 'on', 'a b'], 'on')

    Raises:
        InputError: if the value is not valid yaml, or a path has an unknown home folder.
    """
    if is_open(hint):
        return value_of(value) if isinstance(value, Written) else value
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    is_path = any("path" in getattr(member, "__metadata__", ()) for member in members)
    if isinstance(value, Written):
        value = _text(value, members) if any(map(_takes_text, members)) else value_of(value)
    if is_path and isinstance(value, str):
        return expanded(value)
    for member in members:
        inner = typing.get_args(member)
        if isinstance(value, Mapping) and typing.get_origin(member) is dict:
            return {key: typed(inner[1], item) for key, item in value.items()}
        if isinstance(value, list | tuple) and typing.get_origin(member) in (list, tuple):
            hints = inner if len(inner) == len(value) and Ellipsis not in inner else [inner[0]] * len(value)
            return [typed(one, item) for one, item in zip(hints, value, strict=True)]
    return values(value) if hint is Any else value


def _takes_text(member: Any) -> bool:
    args = typing.get_args(member)
    return (
        member is str
        or (args[:1] == (str,) and "path" in getattr(member, "__metadata__", ()))
        or (_is_literal(member) and str in map(type, args))
    )


def _text(written: Written, members: tuple[Any, ...]) -> Any:
    """Resolve a value whose type in the schema includes text."""
    try:
        value = value_of(written)
    except InputError:
        return text_of(written)
    choices = [choice for member in members for choice in typing.get_args(member) if _is_literal(member)]
    if str(written) in choices:
        return str(written)
    kinds = [typing.get_origin(member) or member for member in members] + [type(one) for one in choices if one == value]
    return value if type(value) in kinds or not written else text_of(written)


def _is_literal(member: Any) -> bool:
    return typing.get_origin(member) is Literal


def expanded(path: str) -> str:
    """Replace a leading `~` or `~user` of a path by the home folder.

    Raises:
        InputError: if there is no such user.
    """
    full = os.path.expanduser(path)
    if full.startswith("~"):
        name = path.partition("/")[0]
        raise InputError(f"{name!r}: there is no such home folder; write ./{path} for a file of that name")
    return full
