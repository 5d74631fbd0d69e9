"""Command-line arguments become dataclasses, and mistakes one line each."""

import dataclasses
from typing import Literal

import pytest

from zzhnet_jax.commands.arguments import ArgumentError, flags, parse
from zzhnet_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Inner:
    """Numbers.

    Attributes:
      crop_size: side of a crop.
      mode: how.
    """

    crop_size: int = 4
    mode: Literal["fast", "slow"] = "fast"
    pair: tuple[float, float] = (1.0, 2.0)

    def __post_init__(self):
        if self.crop_size < 1:
            raise ConfigError("data.crop_size", self.crop_size, "at least 1")


@dataclasses.dataclass(frozen=True)
class Outer:
    """Does something."""

    path: str
    data: Inner = dataclasses.field(default_factory=Inner)
    flag: bool = False
    limit: float | None = 1.0


def read(*argv, default=None):
    return parse(Outer, argv, prog="zzhnet demo", default=default)


def test_fields_are_flags_by_path():
    given = read("--path", "x", "--data.crop-size", "7", "--data.pair", "3", "4", "--flag", "True",
                 "--limit", "None")  # fmt: skip
    assert given == Outer("x", Inner(7, "fast", (3.0, 4.0)), True, None)
    assert read("--path=x", "--data.crop_size=7") == Outer("x", Inner(7))


def test_what_is_not_given_stays_as_in_the_default():
    default = Outer("y", Inner(9, "slow"), limit=None)
    assert read("--data.mode", "fast", default=default) == Outer("y", Inner(9), limit=None)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ["--path", "x", "--data.crop-sise", "7"],
            "crop-sise; did you mean --data.crop-size",
        ),
        (["--path", "x", "--data.crop-size", "seven"], "--data.crop-size: .*'seven'"),
        (
            ["--path", "x", "--data.mode", "medium"],
            "'medium' for .*'--data.mode'.*fast.*slow",
        ),
        (["--path", "x", "--data.pair", "3"], "--data.pair.* 2 values"),
        (["--path", "x", "more"], "unexpected argument 'more'"),
        (["--path", "x", "--zzz"], "no option --zzz; see zzhnet demo --help"),
        ([], "--path"),
    ],
)
def test_mistakes_are_one_line_that_names_the_flag(argv, said, capsys):
    with pytest.raises(ArgumentError, match=said) as caught:
        read(*argv)
    assert "\n" not in str(caught.value) and "│" not in str(caught.value)
    assert capsys.readouterr() == ("", "")


def test_a_value_that_the_dataclass_refuses_keeps_its_own_words():
    with pytest.raises(ConfigError) as caught:
        read("--path", "x", "--data.crop-size", "0")
    assert str(caught.value) == "data.crop_size = 0: it must be at least 1"


def test_help_describes_the_fields_and_ends_the_program(capsys):
    with pytest.raises(SystemExit) as caught:
        read("--help")
    assert not caught.value.code
    out = capsys.readouterr().out
    assert "--data.crop-size INT" in out and "side of a crop" in out and "Does something" in out


def test_flags():
    assert list(flags(Outer)) == [
        "--path", "--data.crop-size", "--data.mode", "--data.pair", "--flag", "--limit",
    ]  # fmt: skip
