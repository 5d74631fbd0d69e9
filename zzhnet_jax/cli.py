"""The `zzhnet` command: picks a subcommand and turns a user's mistakes into one line each."""

import importlib
import sys
from collections.abc import Callable, Sequence

from zzhnet_jax.errors import UserError

COMMANDS = {
    "train": "train a network from a config file",
    "evaluate": "score a trained network on labelled image pairs",
    "predict": "map the changes between two images, or two folders of images",
    "convert": "turn a PyTorch checkpoint into a model, or back",
    "compare-scans": "compare implementations of the selective scan on this machine",
    "models": "list the networks with their parameters, FLOPs and memory",
    "data": "check a dataset, or write synthetic scenes",
}


def _usage() -> str:
    lines = [f"  {name:<14}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ["usage: zzhnet COMMAND ...", "", *lines, "", "zzhnet COMMAND --help says what each takes."]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
      argv: arguments without the program's name; the process's own if None.

    Returns:
      The exit code: 0 on success, 2 when the user can put the problem right.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    name, *rest = argv
    if name not in COMMANDS:
        print(f"error: no command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"zzhnet_jax.commands.{name.replace('-', '_')}")
    return run(module.main, rest)


def run(command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Runs a command function; a `UserError` becomes one line on stderr and exit code 2."""
    try:
        return command(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
