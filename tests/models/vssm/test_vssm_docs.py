"""The programs of docs/vssm.md run, and print what the page says."""

import contextlib
import io
import re
from pathlib import Path

from zzhnet_jax.conversion.forward_type import parse

PAGE = (Path(__file__).parents[3] / "docs" / "vssm.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_programs_run_and_print_what_the_page_says():
    network, strings = blocks("python")
    scope: dict = {}
    exec(network, scope)
    assert scope["fine"].shape == (1, 16, 16, 16) and scope["coarse"].shape == (1, 8, 8, 32)

    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        exec(strings, scope)
    assert told.getvalue() == blocks("text")[0]
    assert scope["ss2d"] == parse("v3noz", dialect="changemamba")
