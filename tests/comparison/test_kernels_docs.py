"""docs/kernels.md names what there is, its commands are read, and its links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from zzhnet_jax.commands.arguments import parse
from zzhnet_jax.commands.compare_scans import CompareArguments
from zzhnet_jax.comparison.cases import HARD_CASES
from zzhnet_jax.comparison.compare import check_names
from zzhnet_jax.comparison.shapes import parse_shapes
from zzhnet_jax.kernels.selective_scan.api import IMPLEMENTATIONS

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "kernels.md").read_text()
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("zzhnet ")
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_are_read(command):
    program, name, *argv = command
    assert (program, name) == ("zzhnet", "compare-scans")
    arguments = parse(CompareArguments, argv, prog="zzhnet compare-scans")
    assert parse_shapes(arguments.shapes) or not arguments.shapes
    assert check_names(arguments.implementations)


def test_every_case_and_implementation_is_named():
    assert len(COMMANDS) >= 4
    for name in (*HARD_CASES, *IMPLEMENTATIONS):
        assert f"`{name}`" in PAGE, name


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", PAGE)
    assert links and all((DOCS / link).exists() for link in links), links
    headings = re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= anchors
