"""Files of losses, metrics and the optimiser."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from golden_case import Case, from_last, to_last

from zzhnet_jax.evaluation import (
    BinaryConfusion,
    binary_metrics,
    confusion_matrix,
    multiclass_metrics,
)
from zzhnet_jax.evaluation.damage import BuildingDamage
from zzhnet_jax.evaluation.semantic import SemanticChange, transition_index
from zzhnet_jax.training import losses, task_losses
from zzhnet_jax.training.config import OptimConfig
from zzhnet_jax.training.optimizer import make_optimizer


def run_losses(case: Case) -> None:
    given = {n: to_last(v, "bchw") if v.ndim == 4 else v for n, v in case.group("in/").items()}
    labels = {name: value for name, value in given.items() if value.ndim == 3}

    def bcd(x):
        entropy = losses.cross_entropy(x["bcd_logits"], labels["bcd_labels"])
        lovasz = losses.lovasz_softmax(x["bcd_logits"], labels["bcd_labels"])
        total = entropy + 0.75 * lovasz
        return total, {"bcd_ce": entropy, "bcd_lovasz": lovasz, "bcd_total": total}

    def scd(x):
        names = ("change", "pre_semantic", "post_semantic")
        keys = ("scd_cd_logits", "scd_t1_logits", "scd_t2_logits")
        logits = {name: x[key] for name, key in zip(names, keys, strict=True)}
        targets = [labels[f"scd_label_{part}"] for part in ("cd", "t1", "t2")]
        total, terms = task_losses.semantic_change_loss(logits, *targets)
        return total, {"scd_total": total, "scd_similarity": terms["similarity"]}

    def bda(x):
        logits = {"building": x["bda_loc_logits"], "damage": x["bda_clf_logits"]}
        targets = labels["bda_label_loc"], labels["bda_label_clf"]
        total, _ = task_losses.damage_loss(logits, *targets)
        return total, {"bda_total": total}

    outputs, gradients = {}, {}
    for loss, task in ((bcd, "bcd"), (scd, "scd"), (bda, "bda")):
        logits = {n: v for n, v in given.items() if v.ndim == 4 and n.startswith(task)}
        gradient, terms = jax.jit(jax.grad(loss, has_aux=True))(logits)
        outputs |= terms
        gradients |= {name: from_last(value, "bchw") for name, value in gradient.items()}
    case.compare_outputs(outputs)
    case.compare_gradients(gradients, "grad/")


def run_metrics(case: Case) -> None:
    x = case.group("in/")
    outputs = {}
    binary = binary_metrics(BinaryConfusion.count(x["bcd_preds"], x["bcd_labels"]))
    for kind in ("pred", "label"):
        parts = [x[f"scd_{part}_{kind}"] for part in ("change", "t1", "t2")]
        outputs[f"scd_{kind}_index"] = transition_index(*parts)
    transitions = outputs["scd_pred_index"], outputs["scd_label_index"]
    damage = BuildingDamage.count(
        building_prediction=x["bda_loc_pred"],
        damage_prediction=x["bda_clf_pred"],
        building_label=x["bda_loc_label"],
        damage_label=x["bda_clf_label"],
    ).metrics()
    classes = case.arrays["out/mc_iou"].size
    several = multiclass_metrics(confusion_matrix(x["mc_pred"], x["mc_label"], classes))
    figures = {
        "bcd": binary,
        "scd": SemanticChange.count(*transitions).metrics(),
        "bda": damage,
        "mc": several,
    }
    aliases = {"loc_f1": "localisation_f1", "clf_hmean_f1": "damage_f1", "oa_f1": "overall"}
    for task, order in case.config["order"].items():
        names = [aliases.get(name, name.lower()) for name in order.split(",")]
        outputs[task] = np.array([figures[task][name] for name in names])
    outputs |= {"bda_per_class_f1": damage["class_f1"], "mc_iou": several["iou"]}
    case.compare_outputs(outputs)


def run_optimizer(case: Case) -> None:
    """AdamW with a rate that falls in steps; the schedule's figures stand in a sentence."""
    c = case.config
    every, factor = re.match(r"StepLR\((\d+), ([\d.]+)\)", c["scheduler"]).groups()
    schedule = optax.exponential_decay(c["lr"], int(every), float(factor), staircase=True)
    beta1, beta2 = c["betas"]
    config = OptimConfig(
        learning_rate=c["lr"],
        weight_decay=c["weight_decay"],
        beta1=beta1,
        beta2=beta2,
        epsilon=c["eps"],
        clip_norm=None,
    )
    params = {
        name: jnp.asarray(value) for name, value in case.group("in/").items() if name[0] == "p"
    }
    optimizer = make_optimizer(config, schedule, mask=None)
    state, outputs = optimizer.init(params), {}
    for step in range(len(case.group("out/")) // len(params)):
        gradient = {name: case.arrays[f"in/g{name[1:]}_step{step}"] for name in params}
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        outputs |= {f"{name}_step{step}": value for name, value in params.items()}
    case.compare_outputs(outputs)
