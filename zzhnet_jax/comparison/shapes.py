"""What `--shapes` means: a network at an image size, or five numbers."""

from collections.abc import Sequence
from typing import Any

from zzhnet_jax.errors import ConfigError
from zzhnet_jax.kernels.selective_scan.shapes import ScanShape
from zzhnet_jax.models import registry

_ROUTES = 4
_ALLOWED = (
    "NETWORK@SIZE, for example vmamba_tiny@256, or five positive integers b,l,d,n,g (batch, length,"
    " channels, d_state, groups) with d a multiple of g"
)


def parse_shapes(texts: Sequence[str]) -> list[ScanShape]:
    """The scans that a list of shapes stands for, in order.

    Args:
      texts: `NETWORK@SIZE` gives one scan a stage of that network for one image of SIZE x SIZE;
        `b,l,d,n,g` gives itself. The beginning of a network's name stands for the first of that
        beginning.

    Raises:
      ConfigError: names the text that is neither.
    """
    return [shape for text in texts for shape in _parse(text)]


def _parse(text: str) -> list[ScanShape]:
    if "@" not in text:
        return [_from_numbers(text)]
    name, _, size = text.partition("@")
    if not size.isdecimal() or int(size) < 1:
        raise ConfigError("--shapes", text, _ALLOWED)
    known = registry.list_models()
    name = next((n for n in known if n == name or n.startswith(f"{name}_")), name)
    return network_scans(name, int(size))


def _from_numbers(text: str) -> ScanShape:
    parts = text.split(",")
    if len(parts) != 5 or not all(part.strip().isdecimal() for part in parts):
        raise ConfigError("--shapes", text, _ALLOWED)
    b, length, d, n, g = map(int, parts)
    if min(b, length, d, n, g) < 1 or d % g:
        raise ConfigError("--shapes", text, _ALLOWED)
    return ScanShape(text, b, length, d, g, n)


def network_scans(name: str, size: int) -> list[ScanShape]:
    """The scan of each encoder stage of a network for one square image.

    The four routes through the image stand as groups of one scan, as PyTorch's kernel gets them.

    Raises:
      ConfigError: there is no such network, or it has no selective scan.
    """
    config: Any = registry.preset(name)
    encoder = getattr(config, "encoder", config)
    ssm = encoder.block.ssm
    if ssm.operator == "ssd" or not ssm.ssm_ratio:
        raise ConfigError("--shapes", f"{name}@{size}", "a network with selective scans")
    side = -(-size // getattr(encoder, "patch_size", 4))
    scans = []
    for stage, width in enumerate(encoder.widths, start=1):
        channels = _ROUTES * ssm.d_inner(width)
        title = f"{name}@{size} stage {stage}"
        scans.append(ScanShape(title, 1, side * side, channels, _ROUTES, ssm.d_state))
        side = -(-side // 2)
    return scans
