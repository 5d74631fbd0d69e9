"""VMamba's `forward_type` strings, read once into typed fields.

VMamba and ChangeMamba pack the variant of the scan operator into a string, with different grammars:
VMamba's suffixes have underscores, ChangeMamba's have none, and a string of one may silently mean
something else to the other.
"""

from dataclasses import fields, replace
from typing import Any, Literal, get_args

from zzhnet_jax.errors import ConversionError
from zzhnet_jax.models.vssm.config import Initialization, Operator, ScanPattern, SS2DConfig
from zzhnet_jax.models.vssm.torch_names import Dialect

# Numbers of these are equal for equal weights: they differ in precision, kernel and memory layout.
_SCANS: dict[Dialect, dict[str, ScanPattern]] = {
    "changemamba": {
        "v1": "cross",
        "v2": "cross",
        "v3": "cross",
        "v4": "cross",
        "v31d": "unidirectional",
        "v32d": "bidirectional",
    },
    "vmamba": {
        "v01": "cross",
        "v02": "cross",
        "v03": "cross",
        "v04": "cross",
        "v05": "cross",
        "v3": "cross",
        "v051d": "unidirectional",
        "v052d": "bidirectional",
        "v052dc": "cascade",
    },
}
_OUTPUT_NORMS: dict[Dialect, dict[str, str]] = {
    "changemamba": {
        "none": "none",
        "dwconv3": "dwconv3",
        "softmax": "softmax",
        "sigmoid": "sigmoid",
    },
    "vmamba": {
        "_onnone": "none",
        "_ondwconv3": "dwconv3",
        "_oncnorm": "layer_dwconv3",
        "_onsoftmax": "softmax",
        "_onsigmoid": "sigmoid",
    },
}
# The first VMamba operator: everything is fixed, whatever the other settings say.
_V0 = dict(
    operator="selective",
    gate="activated",
    output_norm="layer",
    output_activation="none",
    multiply_input=False,
    pattern="cross",
    activation="silu",
    d_conv=3,
    conv_bias=True,
    projection_bias=False,
    initialization="mamba",
)


def parse(text: str, *, dialect: Dialect, base: SS2DConfig | None = None) -> SS2DConfig:
    """Reads a `forward_type`.

    Args:
      text: for example "v05_noz" (VMamba) or "v3noz" (ChangeMamba).
      dialect: whose grammar.
      base: gives the fields that the string does not set (d_state, ssm_ratio, ...).

    Returns:
      `base` with the string's fields.

    Raises:
      ConversionError: the original cannot run this string; says why.
    """
    config = replace(base or SS2DConfig(), gate="none", pattern="cross", multiply_input=False)
    found = _vmamba(text) if dialect == "vmamba" else _changemamba(text)
    if found["operator"] == "ssd" and config.initialization == "mamba":
        found["initialization"] = "uniform"
    return replace(config, **found)


def parse_initialization(
    text: Literal["v0", "v1", "v2"], *, dialect: Dialect, operator: Operator = "selective"
) -> Initialization:
    """Reads VMamba's `initialize`.

    Args:
      text: "v0" (Mamba's), "v1" (normal) or "v2" (uniform).
      dialect: "v1" draws step sizes ten times smaller in VMamba than in ChangeMamba.
      operator: for the xv operators "v1" is alike in both; Mamba-2's always draws the small ones.

    Raises:
      ConversionError: no such mode, or one that the operator does not have.
    """
    if text == "v1":
        small = operator == "ssd" or (dialect == "vmamba" and operator == "selective")
        return "small_normal" if small else "normal"
    if text == "v2":
        return "uniform"
    if text != "v0" or operator == "ssd":
        allowed = "'v1' or 'v2'" if operator == "ssd" else "'v0', 'v1' or 'v2'"
        raise ConversionError(f"initialize = {text!r}: operator {operator!r} knows {allowed}")
    return "mamba"


def explain(text: str) -> str:
    """Says in plain words what a `forward_type` means in each dialect, and where the two differ."""
    meanings: dict[str, SS2DConfig] = {}
    lines = [f"forward_type {text!r}"]
    for dialect in get_args(Dialect):
        try:
            meanings[dialect] = parse(text, dialect=dialect)
            lines.append(f"  {dialect}: {_describe(text, dialect, meanings[dialect])}")
        except ConversionError as error:
            lines.append(f"  {dialect}: cannot run. {error}")
    if len(meanings) == 2:
        lines.append(f"  {_compare(meanings)}")
    return "\n".join(lines)


def _strip(text: str, suffix: str) -> tuple[bool, str]:
    return (True, text.removesuffix(suffix)) if text.endswith(suffix) else (False, text)


def _output_norm(text: str, dialect: Dialect) -> tuple[str, str]:
    for suffix, kind in _OUTPUT_NORMS[dialect].items():
        found, rest = _strip(text, suffix)
        if found:
            return kind, rest
    return "layer", text


def _changemamba(text: str) -> dict[str, Any]:
    """Suffixes come off the end in the order no32, noz, nozact, one output norm."""
    if text.startswith("v0"):
        return dict(_V0)
    if text.startswith("xv"):
        return _changemamba_xv(text)
    _, rest = _strip(text, "no32")
    no_gate, rest = _strip(rest, "noz")
    linear_gate, rest = _strip(rest, "nozact")
    output_norm, rest = _output_norm(rest, "changemamba")
    if rest not in _SCANS["changemamba"]:
        raise ConversionError(_unknown(text, rest, "changemamba"))
    return dict(
        operator="selective",
        gate=_gate(no_gate, linear_gate),
        output_norm=output_norm,
        output_activation="none",
        pattern=_SCANS["changemamba"][rest],
    )


def _changemamba_xv(text: str) -> dict[str, Any]:
    """Base, act, mul, output norm; the base is recognised by its first four letters."""
    output_norm, rest = _output_norm(text, "changemamba")
    multiply, rest = _strip(rest, "mul")
    activate, rest = _strip(rest, "act")
    operator = rest[:4]
    if operator not in ("xv1a", "xv2a", "xv3a"):
        raise ConversionError(_unknown(text, rest, "changemamba"))
    return dict(
        operator=operator,
        output_norm=output_norm,
        output_activation="gelu" if activate else "none",
        multiply_input=multiply,
    )


def _vmamba(text: str) -> dict[str, Any]:
    """Suffixes come off the end in the order _no32, _oact, _noz, _nozact, one output norm."""
    if text in ("v0", "v0seq"):
        return dict(_V0)
    if text.startswith("xv"):
        raise ConversionError(
            f"{text!r}: VMamba's xv operators fail when called (their one-by-one scan is given a "
            "4-D tensor); ChangeMamba's run: use dialect 'changemamba'"
        )
    _, rest = _strip(text, "_no32")
    activate, rest = _strip(rest, "_oact")
    no_gate, rest = _strip(rest, "_noz")
    linear_gate, rest = _strip(rest, "_nozact")
    output_norm, rest = _output_norm(rest, "vmamba")
    found = dict(
        operator="selective",
        gate=_gate(no_gate, linear_gate),
        output_norm=output_norm,
        output_activation="gelu" if activate else "none",
    )
    if rest == "m0":
        if not no_gate:
            raise ConversionError(
                f"{text!r}: with a gate VMamba's m0 reads an attribute that is never set; only "
                "m0_noz runs"
            )
        return found | dict(operator="ssd")
    if rest == "v2":
        raise ConversionError(
            f"{text!r}: VMamba's v2 asks for the backend 'core', which an assertion rejects; "
            "v03 is the same function"
        )
    if rest not in _SCANS["vmamba"]:
        raise ConversionError(_unknown(text, rest, "vmamba"))
    return found | dict(pattern=_SCANS["vmamba"][rest])


def _gate(no_gate: bool, linear_gate: bool) -> str:
    if no_gate:
        return "none"
    return "linear" if linear_gate else "activated"


def _unknown(text: str, base: str, dialect: Dialect) -> str:
    special = {"vmamba": ["v0", "v0seq", "m0"], "changemamba": ["v0*", "xv1a", "xv2a", "xv3a"]}
    known = ", ".join([*special[dialect], *_SCANS[dialect]])
    left = "" if base == text else f" (without its suffixes: {base!r})"
    hint = ""
    other: Dialect = "changemamba" if dialect == "vmamba" else "vmamba"
    separators = {"vmamba": "'_noz'", "changemamba": "'noz'"}
    if base.endswith(("_", "noz", "nozact", "no32", *_OUTPUT_NORMS[other])):
        hint = f"; suffixes are written like {separators[dialect]} here"
    return f"{text!r}{left} is no base that {dialect} can call; it has {known}{hint}"


def _describe(text: str, dialect: Dialect, config: SS2DConfig) -> str:
    scans = {
        "cross": "rows and columns, forward and backward",
        "unidirectional": "rows forward, four times",
        "bidirectional": "rows forward twice and backward twice",
        "cascade": "rows, then the columns of the result (backward ones are summed unturned)",
    }
    operators = {
        "selective": "selective scan",
        "xv1a": "selective scan, u, low-rank steps, B and C from one projection",
        "xv2a": "selective scan, u, full steps, B and C from one projection",
        "xv3a": "selective scan, u, a low-rank step per route, B and C from one projection",
        "ssd": "Mamba-2 scan with heads",
    }
    gates = {
        "activated": "gated by act(z)",
        "linear": "gated by z as it is",
        "none": "no gate",
    }
    norms = {
        "layer": "layer norm",
        "none": "no norm",
        "dwconv3": "3x3 depthwise convolution",
        "layer_dwconv3": "layer norm and 3x3 depthwise convolution",
        "softmax": "softmax over the pixels",
        "sigmoid": "sigmoid",
    }
    parts = [
        f"{operators[config.operator]} along {scans[config.pattern]}",
        gates[config.gate],
        f"{norms[config.output_norm]} on the output",
    ]
    if config.output_activation == "gelu":
        parts.append("then GELU")
    if config.multiply_input:
        parts.append("multiplied by u")
    trap = ""
    if dialect == "changemamba" and text.startswith("v0") and text not in ("v0", "v0seq"):
        trap = (
            ' Whatever starts with "v0" builds v0 here: the rest of the string is ignored, and so '
            "are the settings of activation, convolution and initialisation."
        )
    elif text in ("v0", "v0seq"):
        trap = " Activation SiLU, 3x3 convolution with bias and Mamba's initialisation are fixed."
    elif text.endswith("no32"):
        trap = " The scan may run in half precision in the original; here it is always float32."
    return "; ".join(parts) + "." + trap


def _compare(meanings: dict[str, SS2DConfig]) -> str:
    ours, theirs = meanings["vmamba"], meanings["changemamba"]
    differing = [f.name for f in fields(ours) if getattr(ours, f.name) != getattr(theirs, f.name)]
    if not differing:
        return "Both dialects mean the same function."
    listing = ", ".join(
        f"{name} ({getattr(ours, name)!r} in vmamba, {getattr(theirs, name)!r} in changemamba)"
        for name in differing
    )
    return f"The dialects differ in {listing}: weights of one give other numbers in the other."
