"""Files of whole networks, in evaluation and in training mode."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from golden_case import DIALECTS, FAST_COMPILATION, Case, check_module, from_last, to_last

from zzhnet_jax.conversion.legacy_config import vssm_config
from zzhnet_jax.conversion.rules import from_state_dict, to_state_dict
from zzhnet_jax.models import changemamba, functional
from zzhnet_jax.models.changemamba.config import ARRANGEMENTS, ChangeMambaConfig
from zzhnet_jax.models.changemamba.torch_names import changemamba_rules
from zzhnet_jax.models.cost import replace_everywhere
from zzhnet_jax.models.vssm import VSSM, Backbone
from zzhnet_jax.models.vssm import torch_names as vssm_names
from zzhnet_jax.models.vssm.config import VSSMConfig
from zzhnet_jax.models.vssm.torch_names import Dialect
from zzhnet_jax.training import losses


def encoder_config(c: dict, dialect: Dialect) -> VSSMConfig:
    """Naming the scan that a CPU runs anyhow spares the tracing of those of other platforms."""
    return replace_everywhere(vssm_config(c, dialect), "scan_implementation", "chunked")


def run_vssm(case: Case) -> None:
    c, dialect = case.config, DIALECTS[case.config["lib"]]
    config = encoder_config(c, dialect)

    def call(model, x):
        return {"logits": model(to_last(x["x"], "bchw"))}

    check_module(
        case,
        lambda rngs: VSSM(config, c["num_classes"], rngs=rngs),
        vssm_names.vssm_rules(config, dialect),
        call,
    )


def run_backbone(case: Case) -> None:
    c, dialect = case.config, DIALECTS[case.config["lib"]]
    config = encoder_config(c, dialect)
    indices = tuple(c.get("out_indices", range(len(config.depths))))

    def call(model, x):
        features = model(to_last(x["x"], "bchw"))
        return {f"o{i}": from_last(y, "bchw") for i, y in zip(indices, features, strict=True)}

    check_module(
        case,
        lambda rngs: Backbone(config, out_indices=indices, rngs=rngs),
        vssm_names.backbone_rules(config, dialect),
        call,
    )


def change_network(case: Case, *, decoder_drop_path: float = 0.1) -> tuple:
    """Builder and rules of a change network. `mmbda` is `bda` with other switches."""
    c = case.config
    multimodal = c["task"] == "mmbda"
    config = ChangeMambaConfig(
        task="bda" if multimodal else c["task"],
        encoder=encoder_config(c, "changemamba"),
        separate_encoders=multimodal,
        arrangements=("cat",) if multimodal else ARRANGEMENTS,
        scan_finest=not multimodal,
        decoder_width=c["hidden_dim"],
        decoder_drop_path=decoder_drop_path,
        semantic_classes=c.get("output_clf", 7),
        damage_classes=c.get("output_damage", 5),
    )
    classes = c.get("output_cd", c.get("output_building", 2))
    rules = changemamba_rules(config, c["layout"])
    return lambda rngs: changemamba.build(config, classes, rngs=rngs), rules


def run_change(case: Case) -> None:
    names = {"pre_semantic": "sem_t1", "post_semantic": "sem_t2"}

    def call(model, x):
        outputs = model(to_last(x["pre"], "bchw"), to_last(x["post"], "bchw"))
        outputs = outputs if isinstance(outputs, dict) else {"change": outputs}
        return {names.get(n, n): from_last(y, "bchw") for n, y in outputs.items()}

    check_module(case, *change_network(case), call)


def run_change_training(case: Case) -> None:
    """One training-mode pass: running statistics, gradients of cross entropy and of the sum."""
    build, rules = change_network(case, decoder_drop_path=0.0)
    graphdef, *template = functional.abstract(build)
    params, stats, _ = from_state_dict(case.group("sd/"), tuple(template), rules)
    images = {name: case.arrays[f"in/{name}"] for name in ("pre", "post")}
    labels = case.arrays["in/labels"]

    @partial(jax.jit, compiler_options=FAST_COMPILATION)
    def run(params, images, cotangent):
        def forward(params, images):
            pair = [to_last(images[name], "bchw") for name in ("pre", "post")]
            logits, new_stats = functional.apply(graphdef, params, stats, *pair, train=True)
            entropy, lovasz = (
                losses.cross_entropy(logits, labels),
                losses.lovasz_softmax(logits, labels),
            )
            outputs = {"loss_ce": entropy, "lovasz": lovasz, "loss_total": entropy + 0.75 * lovasz}
            outputs["logits"] = from_last(logits, "bchw")
            return jnp.stack((entropy, outputs["loss_total"])), (outputs, new_stats)

        _, pull, aux = jax.vjp(forward, params, images, has_aux=True)
        return aux, pull(cotangent)

    results = [jax.device_get(run(params, images, cotangent)) for cotangent in np.eye(2)]
    outputs, new_stats = results[0][0]
    running = to_state_dict(params, new_stats, rules)
    outputs |= {f"bn/{name}": running[name] for name in case.group("out/bn/")}
    case.compare_outputs(outputs)
    for name, (_, (d_params, d_images)) in zip(("ce", "total"), results, strict=True):
        case.compare_gradients(d_images, f"grad_{name}/in/")
        case.compare_gradients(to_state_dict(d_params, {}, rules), f"grad_{name}/sd/")
