"""Turns command-line arguments into a dataclass; whatever is wrong with them becomes one line."""

import contextlib
import dataclasses
import difflib
import io
import re
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, TypeVar

import tyro

from zzhnet_jax.errors import UserError

Arguments = TypeVar("Arguments")


def option(metavar: str) -> Any:
    """Marks a flag whose absence means what its help says, rather than None."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


Switch = Annotated[
    bool,
    tyro.conf.arg(help_behavior_hint=""),
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=0,
        metavar="",
        instance_from_str=lambda _: True,
        is_instance=lambda value: isinstance(value, bool),
        str_from_instance=lambda _: [],
    ),
]
"""A flag that takes no value: present or not."""


class ArgumentError(UserError):
    """An argument that the command does not take, lacks, or cannot read."""


def parse(
    cls: type[Arguments],
    argv: Sequence[str],
    *,
    prog: str,
    default: Arguments | None = None,
) -> Arguments:
    """Reads arguments; every field is a flag, nested ones by their path: `--data.batch-size 8`.

    Args:
      cls: a dataclass whose docstring describes the command and its fields.
      argv: arguments without the program's name; with `--help` among them, help is printed and the
        program ends.
      prog: how the user calls this command.
      default: values of fields that are not given.

    Raises:
      ArgumentError: a flag that does not exist, a value it cannot have, or one that is missing.
      UserError: what the dataclass itself raised, as it was.
    """
    help_wanted = "--help" in argv or "-h" in argv
    messages = io.StringIO()
    try:
        # Help and errors both leave through SystemExit; what errors write is kept to become a line.
        with contextlib.redirect_stderr(messages):
            result, unknown = tyro.cli(
                cls,
                args=list(argv),
                prog=prog,
                default=tyro.MISSING_NONPROP if default is None else default,
                return_unknown_args=True,
                config=(tyro.conf.FlagConversionOff,),
            )
    except SystemExit as end:
        if help_wanted and not end.code:
            raise
        raise _explain(end, messages.getvalue(), prog) from None
    if unknown:
        raise _unknown(unknown[0], cls, prog)
    return result


def _explain(end: SystemExit, text: str, prog: str) -> UserError:
    error: BaseException | None = end
    while error is not None:
        if isinstance(error, UserError):
            return error
        error = error.__cause__ or error.__context__
    lines = [line.strip("│╭╮╰╯─ \t") for line in text.splitlines()]
    body = lines[1 : lines.index("", 1)] if "" in lines[1:] else lines[1:]
    message = re.sub(r"\s+", " ", " ".join(body)).strip()
    message = message.removeprefix("Error parsing ").removesuffix(".")
    return ArgumentError(f"{message}; see {prog} --help")


def _unknown(token: str, cls: type, prog: str) -> ArgumentError:
    if not token.startswith("-"):
        return ArgumentError(f"unexpected argument {token!r}; see {prog} --help")
    name = token.split("=")[0].replace("_", "-")
    near = difflib.get_close_matches(name, list(flags(cls)), n=2, cutoff=0.7)
    hint = f"did you mean {' or '.join(near)}?" if near else f"see {prog} --help"
    return ArgumentError(f"no option {name}; {hint}")


def flags(cls: type, prefix: str = "--") -> Iterator[str]:
    """All flags of a dataclass, those of nested ones by their path."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(hints[field.name]):
            yield from flags(hints[field.name], f"{name}.")
        else:
            yield name
