"""Every command and the Python of docs/conversion.md, run on stand-ins for the published files."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import zzhnet_jax
from zzhnet_jax import cli
from zzhnet_jax.conversion import save_torch_state_dict, to_torch_state_dict

PAGE = (Path(__file__).parents[2] / "docs" / "conversion.md").read_text()
SMALL = {"depths": (1, 1), "dims": 8}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def files(tmp_path, random_network, monkeypatch):
    """Small networks under the names that the page uses; VMamba's has its published size."""
    monkeypatch.chdir(tmp_path)
    small = {"encoder": SMALL, "decoder_width": 8}
    networks = {
        "MambaBCD_Tiny.pth": random_network("mambabcd_tiny", 2, **small),
        "MambaSCD_Tiny.pth": random_network("mambascd_tiny", 2, **small),
        "MambaBDA_Tiny.pth": random_network("mambabda_tiny", 2, **small),
        "MambaMMBDA_Tiny.pth": random_network("mambammbda_tiny", 2, **small),
        "my_v052d.pth": random_network("vmamba_tiny_s2l5", 4, **SMALL),
    }
    for name, network in networks.items():
        save_torch_state_dict(to_torch_state_dict(network), name)
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    published = to_torch_state_dict(random_network("vmamba_tiny_s2l5", 1000))
    tensors = {name: torch.from_numpy(array) for name, array in published.items()}
    torch.save({"model": tensors, "model_ema": tensors}, "vssm1_tiny_0230s.pth")
    for name in ("before.png", "after.png"):
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(name)


@pytest.mark.slow
@pytest.mark.torch
def test_every_command_and_program(files, capsys):
    commands = "".join(blocks("sh")).replace("\\\n", " ").strip().splitlines()
    assert len(commands) >= 12
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "zzhnet"
        assert cli.main(arguments) == 0, command
    told = capsys.readouterr().out
    assert blocks("text")[0].splitlines()[0] in told

    first, second = blocks("python")
    model = zzhnet_jax.load_model("models/vmamba_tiny")
    assert 'load_model("models/vmamba_tiny")' in first and model.config.dims == 96
    exec(second, {})
    assert "True" in capsys.readouterr().out and Path("for_mambacd.pth").exists()
