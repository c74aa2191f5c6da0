"""Describe the keys of a schema as text, for `--help`."""

import dataclasses
import typing
from typing import Any


def describe(schema: type, indent: str = "  ", only: str | None = None, noted: type | None = None) -> str:
    """A text with the type, default and meaning of each key of a schema.

    Args:
        schema: a dataclass.
        indent: start of each line.
        only: the only key to describe; None describes all.
        noted: the dataclass with the meanings below its fields; None takes the schema itself.
    """
    lines = []
    notes = attribute_notes(noted or schema)
    for item in dataclasses.fields(schema):
        if only not in (None, item.name):
            continue
        default = item.default if item.default is not dataclasses.MISSING else None
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        hint = typing.get_type_hints(schema)[item.name]
        if dataclasses.is_dataclass(default):
            lines.append(f"{indent}{item.name}.   {notes.get(item.name, '')}".rstrip())
            lines.append(describe(type(default), indent + "  "))
        elif typing.get_origin(hint) is list and dataclasses.is_dataclass(typing.get_args(hint)[0]):
            lines.append(f"{indent}{item.name}[i].   {notes.get(item.name, '')}".rstrip())
            lines.append(describe(typing.get_args(hint)[0], indent + "  "))
        else:
            shown = "(must be given)" if default == "???" else f"= {default}"
            lines.append(f"{indent}{item.name}: {_shown(hint)} {shown}   {notes.get(item.name, '')}".rstrip())
    return "\n".join(lines)


def _shown(hint: Any) -> str:
    """A type as it is written in source code."""
    if typing.get_origin(hint) is typing.Union:  # get_type_hints turns `X | None` of annotated types into Optional[X]
        return " | ".join("None" if member is type(None) else _shown(member) for member in typing.get_args(hint))
    return str(hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else hint).replace("typing.", "")


def attribute_notes(schema: type) -> dict[str, str]:
    """The docstrings below the fields of a dataclass and its bases, by field, each as one line."""
    import ast
    import inspect
    import textwrap

    notes: dict[str, str] = {}
    for base in reversed(schema.__mro__[:-1]):
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        except (OSError, TypeError, SyntaxError):
            continue  # made at run time by schema_of
        assert isinstance(body, ast.ClassDef)
        for left, right in zip(body.body, body.body[1:], strict=False):
            if isinstance(left, ast.AnnAssign) and isinstance(left.target, ast.Name) and isinstance(right, ast.Expr):
                notes[left.target.id] = " ".join(str(typing.cast(ast.Constant, right.value).value).split())
    return notes
