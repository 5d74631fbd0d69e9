"""Files of operators and layers."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from golden_case import DIALECTS, FAST_COMPILATION, NORMS, Case, check_module, from_last, to_last

from zzhnet_jax.conversion.legacy_config import block_config, ss2d_config
from zzhnet_jax.kernels.cross_scan import cross_merge, cross_scan
from zzhnet_jax.kernels.selective_scan import selective_scan
from zzhnet_jax.models.vssm import SS2DConfig, VSSBlock
from zzhnet_jax.models.vssm import torch_names as vssm_names
from zzhnet_jax.models.vssm.initializers import step_bias
from zzhnet_jax.models.vssm.patches import Downsample, PatchEmbed
from zzhnet_jax.models.vssm.scans import SelectiveScan, initial_A_log
from zzhnet_jax.models.vssm.vssm import make_ss2d


def run_selective_scan(case: Case) -> None:
    c = case.config
    inputs, cotangent = case.group("in/"), case.group("cot/")["y"]
    assert ("D" in inputs, "delta_bias" in inputs) == (c["has_D"], c["has_delta_bias"])

    @partial(jax.jit, static_argnames="implementation", compiler_options=FAST_COMPILATION)
    def run(inputs, cotangent, implementation):
        def forward(x):
            y = selective_scan(
                jnp.moveaxis(x["u"], 1, 2),
                jnp.moveaxis(x["delta"], 1, 2),
                x["A"],
                jnp.moveaxis(x["B"], 3, 1),
                jnp.moveaxis(x["C"], 3, 1),
                x.get("D"),
                delta_bias=x.get("delta_bias"),
                delta_softplus=c["delta_softplus"],
                implementation=implementation,
            )
            return jnp.moveaxis(y, 2, 1)

        y, pull = jax.vjp(forward, inputs)
        return y, pull(cotangent)[0]

    for implementation in ("sequential", None):
        y, gradients = run(inputs, cotangent, implementation)
        case.compare_outputs({"y": y})
        case.compare_gradients(gradients, "grad/in/")


PATTERNS = {"cross2d": "cross", "unidi": "unidirectional", "bidi": "bidirectional"}


def scan_routes(x: jax.Array, pattern: str) -> jax.Array:
    """Sequences (b, 4, l, c) of an image (b, h, w, c) by the originals' name of the pattern."""
    if pattern == "rot90x4":
        turned = [jnp.rot90(x, k, axes=(1, 2)) for k in range(4)]
        return jnp.stack([cross_scan(t, "unidirectional")[:, 0] for t in turned], axis=1)
    return cross_scan(x, PATTERNS[pattern])


def merge_routes(ys: jax.Array, pattern: str, height: int, width: int) -> jax.Array:
    """Image (b, h, w, c) of sequences (b, 4, l, c)."""
    if pattern == "rot90x4":
        turned = [
            ys[:, k].reshape(len(ys), *(height, width)[:: 1 - 2 * (k % 2)], -1) for k in range(4)
        ]
        return sum(jnp.rot90(t, -k, axes=(1, 2)) for k, t in enumerate(turned))
    return cross_merge(ys, height=height, width=width, pattern=PATTERNS[pattern])


def run_cross_scan(case: Case) -> None:
    """Names: {scan,merge}_<pattern>_<layout of image>_<of sequences>, or *1b1_<pattern>_cf."""
    x, ys = case.group("in/")["x_bchw"], case.group("in/")["ys_bkchw"]
    size = x.shape[2:]

    def scan(x, pattern, image, sequence):
        y = scan_routes(jnp.moveaxis(x, 1, -1) if image == "cf" else x, pattern)
        return jnp.moveaxis(y, (1, 2, 3), (1, 3, 2) if sequence == "cf" else (2, 1, 3))

    def merge(ys, pattern, image, sequence):
        ys = ys if sequence == "cf" else jnp.moveaxis(ys, (3, 4), (1, 2))
        ys = jnp.swapaxes(ys.reshape(*ys.shape[:3], -1), 2, 3)
        y = merge_routes(ys, pattern, *size)
        y = y.reshape(y.shape[0], -1, y.shape[-1])
        return jnp.swapaxes(y, 1, 2) if image == "cf" else y

    def scan1b1(ys, pattern, image):
        return jnp.stack([scan(ys[:, k], pattern, image, image)[:, k] for k in range(4)], axis=1)

    def merge1b1(ys, pattern, image):
        alone = [ys * (jnp.arange(4) == k)[:, None, None, None] for k in range(4)]
        return jnp.stack([merge(y, pattern, image, image) for y in alone], axis=1)

    functions = {"scan": scan, "merge": merge, "scan1b1": scan1b1, "merge1b1": merge1b1}
    for name, expected in case.group("out/").items():
        operation, pattern, *layouts = name.split("_")
        given = x if operation == "scan" else ys
        if operation == "scan" and layouts[0] == "cl":
            given = np.moveaxis(x, 1, -1)
        if operation == "merge" and layouts[1] == "cl":
            given = np.moveaxis(ys, (1, 2), (3, 4))
        options = dict(zip(("image", "sequence"), layouts, strict=False))
        y, pull = jax.vjp(partial(functions[operation], pattern=pattern, **options), given)
        case.compare(f"out/{name}", y, expected)
        if f"cot/{name}" in case.arrays:
            (gradient,) = pull(case.arrays[f"cot/{name}"])
            case.compare(f"grad/in/{name}", gradient, case.arrays[f"grad/in/{name}"])


def run_init(case: Case) -> None:
    for name, uniform in case.group("in/u_").items():
        options = case.config[name]
        bias = step_bias(
            uniform,
            dt_min=options["dt_min"],
            dt_max=options["dt_max"],
            floor=options["dt_init_floor"],
        )
        case.compare(f"dt_bias_{name}", bias, case.arrays[f"out/dt_bias_{name}"])
    config = SS2DConfig()
    for name, expected in case.group("out/A_logs_").items():
        case.compare(name, initial_A_log(config, expected.shape, nnx.Rngs(0)), expected)
    scan = SelectiveScan(case.arrays["out/Ds"].size, 1, config, rngs=nnx.Rngs(0))
    case.compare("Ds", scan.D[0], case.arrays["out/Ds"])


def run_patch_embed(case: Case) -> None:
    c = case.config
    version = int(c["version"][1:])

    def build(rngs):
        return PatchEmbed(
            c["in_chans"],
            c["embed_dim"],
            version=version,
            patch_size=c["patch_size"],
            norm=NORMS[c["norm"]],
            rngs=rngs,
        )

    def call(model, x):
        return {"y": from_last(model(to_last(x["x"], c["layout_in"])), c["layout_out"])}

    check_module(case, build, vssm_names.patch_embed_rules(version), call)


def single_image(layout: str) -> Callable:
    def call(model, x):
        return {"y": from_last(model(to_last(x["x"], layout)), layout)}

    return call


def run_downsample(case: Case) -> None:
    c = case.config
    version = int(c["version"][1:])
    build = partial(Downsample, c["dim"], c["out_dim"], version=version, norm=NORMS[c["norm"]])
    check_module(
        case,
        lambda rngs: build(rngs=rngs),
        vssm_names.downsample_rules(version),
        single_image(c["layout"]),
    )


def run_ss2d(case: Case) -> None:
    c, dialect = case.config, DIALECTS[case.config["lib"]]
    names = "forward_type d_state ssm_ratio dt_rank act d_conv conv_bias bias dropout initialize"
    config = ss2d_config(dialect=dialect, **{name: c[name] for name in names.split()})
    build = partial(make_ss2d, c["d_model"], config)
    rules = vssm_names.ss2d_rules(config, dialect)
    check_module(case, lambda rngs: build(rngs=rngs), rules, single_image(c["layout"]))


def run_vssblock(case: Case) -> None:
    c, dialect = case.config, DIALECTS[case.config["lib"]]
    config = block_config(c, dialect)
    build = partial(VSSBlock, c["hidden_dim"], config)
    layout = "bchw" if c["channel_first"] else "bhwc"
    rules = vssm_names.block_rules(config, dialect)
    check_module(case, lambda rngs: build(rngs=rngs), rules, single_image(layout))
