"""The command's entry: subcommands, exit codes, one line for a user's mistake."""

import json

from zzhnet_jax import cli
from zzhnet_jax.errors import ConfigError


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)


def test_no_command_and_unknown_commands_exit_with_2(capsys):
    assert cli.main([]) == 2
    assert cli.main(["trian"]) == 2
    assert "no command 'trian'" in capsys.readouterr().err


def test_a_users_mistake_is_one_line(capsys):
    def command(argv):
        raise ConfigError("data.crop_size", 300, "at most 256")

    assert cli.run(command, []) == 2
    assert capsys.readouterr().err == "error: data.crop_size = 300: it must be at most 256\n"


def test_models_as_json(capsys):
    assert cli.main(["models", "zzhnet_nano", "--size", "64", "--json"]) == 0
    (cost,) = json.loads(capsys.readouterr().out).values()
    assert 0 < cost["parameters"] < 1_100_000
    assert cost["macs"] > 1e7 and cost["flops"] > 2 * cost["macs"]


def test_models_names_the_nearest(capsys):
    assert cli.main(["models", "zzhnet_naon"]) == 2
    assert "did you mean zzhnet_nano" in capsys.readouterr().err
