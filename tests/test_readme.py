"""The README's commands, run as they stand there on a folder of rendered scenes."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import zzhnet_jax
from zzhnet_jax import cli
from zzhnet_jax.data.config import SyntheticConfig
from zzhnet_jax.data.synthetic import write_dataset

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
# Enough for a run to have everything, in seconds instead of minutes.
SHORT = (
    "--train.steps 2 --train.validate-every 2 --train.log-every 1 --data.batch-size 2"
    " --data.crop-size 32 --data.rendered-pairs 0 --model.overrides.width 8"
    " --model.overrides.depths 1,1,1,1 --model.overrides.decoder-width 8"
    " --model.overrides.num-shared-stages 4 --model.overrides.cssm-stages 3"
    " --model.overrides.head bilinear"
).split()


def commands() -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = [command[1] for command in commands() if command[0] == "make"]
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


@pytest.mark.slow
def test_commands_run_in_order(tmp_path, monkeypatch, capsys):
    """Checks, trains, evaluates and predicts; then the README's Python on what they left."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    write_dataset(
        SyntheticConfig(size=32, train_pairs=4, val_pairs=2, test_pairs=2), Path("photos")
    )
    before, after = (
        sorted(Path("photos").glob("test/A/*"))[0],
        sorted(Path("photos").glob("test/B/*"))[0],
    )
    Path("before.png").write_bytes(before.read_bytes())
    Path("after.png").write_bytes(after.read_bytes())

    mine = [command[1:] for command in commands() if command[0] == "zzhnet"]
    assert [command[0] for command in mine] == ["data", "train", "evaluate", "predict"]
    for command in mine:
        extra = SHORT if command[0] == "train" else []
        assert cli.main([*command, *extra]) == 0, capsys.readouterr().err

    mask = np.asarray(Image.open("out/before_mask.png"))
    model = zzhnet_jax.load_model("runs/mine")
    pre, post = (
        np.asarray(Image.open(name).convert("RGB")) for name in ("before.png", "after.png")
    )
    result = zzhnet_jax.predict(model, pre, post)
    np.testing.assert_array_equal(result.mask * 255, mask)
