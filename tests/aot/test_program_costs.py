"""Costs read from the text of compiled programs, against counts made by hand."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from zzhnet_jax.aot.chips import chip_named
from zzhnet_jax.aot.compile import describe
from zzhnet_jax.aot.hlo_groups import first_group, permuted_pairs
from zzhnet_jax.aot.hlo_text import parse_program
from zzhnet_jax.aot.program_costs import Collective, ProgramCosts, program_costs
from zzhnet_jax.aot.roofline import roofline

TEXTS = Path(__file__).parent / "programs"


def costs_of(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(function).lower(*arguments).compile()
    return describe(compiled, None, jax.devices()[:1])


def test_a_product_in_a_loop_counts_as_often_as_the_loop_runs():
    def run(x, w):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=13)[0]

    description = costs_of(run, (16, 64), (64, 64))
    assert description.costs.flops == {"f32": 13 * 2 * 16 * 64 * 64}
    assert description.costs.unknown_loops == 0
    assert description.memory.arguments == 4 * (16 * 64 + 64 * 64)
    assert description.fits is None and description.roofline is None
    # Every round reads w and the carry and writes the carry; whatever else it does is less.
    least = 13 * 4 * (64 * 64 + 2 * 16 * 64)
    assert least <= description.costs.memory_bytes <= 2.5 * least


def test_a_slice_of_a_long_array_costs_the_slice():
    def run(x, w):
        return jax.lax.scan(lambda c, row: (c + row @ w, None), jnp.zeros((8, 64)), x)[0]

    long, short = (costs_of(run, (n, 8, 64), (64, 64)).costs.memory_bytes for n in (512, 64))
    assert 7 < long / short < 9  # not 64, as if every round read the whole of x


@pytest.mark.parametrize(
    ("stride", "padding", "dilation"), [(1, "SAME", 1), (2, "SAME", 1), (2, "VALID", 2)]
)
def test_convolutions_count_what_meets_the_image(stride, padding, dilation):
    def run(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), padding, rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    size, features_in, features_out = 9, 3, 5
    ones = jnp.ones((1, size, size, 1)), jnp.ones((3, 3, 1, 1))
    met = int(run(*ones).sum())  # each meeting adds one
    counted = costs_of(run, (2, size, size, features_in), (3, 3, features_in, features_out))
    assert counted.costs.flops == {"f32": 2 * 2 * met * features_in * features_out}


def test_a_tpu_program_is_counted_as_it_is_on_a_gpu():
    """One program on 8 devices in a 4 x 2 mesh: 7 rounds forward and 7 back, w split over 2."""
    both = {
        name: program_costs(parse_program((TEXTS / f"scan_{name}.txt").read_text()))
        for name in ("v5e", "h100")
    }
    rows, width, rounds = 64 // 8, 1024, 7
    products = 3 * rounds * 2 * rows * width * width
    assert both["h100"].flops == {"f32": products + 2 * rows * 8 * 8 * 64 * 9 * 4}
    in_image = 2 * rows * 64 * 4 * (3 * 8 - 1) ** 2  # the last column and row of windows overhang
    assert sum(both["v5e"].flops.values()) == products + in_image
    whole = 4 * width * width
    expected = {
        "all-reduce": whole / 2,  # the gradient of half of w, over `data`
        "all-gather": rounds * (whole + 4 * 2 * rows * width),
        "reduce-scatter": rounds * whole,
        "all-to-all": rounds * 4 * 2 * rows * width,
        "collective-permute": 0.0,
    }
    assert both["h100"].collective_bytes == expected
    # On TPU products take bfloat16, so what is gathered for them is half as large.
    halved = {"all-gather": 0.5, "all-to-all": 0.5}
    assert both["v5e"].collective_bytes == {
        kind: size * halved.get(kind, 1.0) for kind, size in expected.items()
    }
    assert both["v5e"].unknown_loops == both["h100"].unknown_loops == 0


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,1},{2,3}}", (0, 1)),
        ("replica_groups=[4,2]<=[8]", (0, 1)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=4], device_ids=([4,2]T(1,0)) {'c'}", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}", (0, 1)),
        ("replica_groups={}", tuple(range(8))),
    ],
)
def test_groups_are_read_in_every_form(text, group):
    assert first_group(text + ", dimensions={0}", 8) == group


def test_of_a_permutation_the_farthest_pair_is_told():
    assert permuted_pairs("source_target_pairs={{0,1},{1,2},{7,0},{3,3}}") == (7, 0)


def test_each_collective_sends_what_its_best_algorithm_does():
    def sent(kind, devices):
        return Collective(kind, 1000, tuple(range(devices)), 1, None).sent_bytes

    assert sent("all-reduce", 4) == 1500 and sent("all-reduce", 256) == pytest.approx(1992.2, 1e-4)
    assert sent("all-gather", 4) == sent("reduce-scatter", 4) == sent("all-to-all", 4) == 750
    assert sent("collective-permute", 2) == 1000


def test_the_roofline_takes_the_network_between_hosts():
    chip = chip_named("h100")
    inside = Collective("all-gather", 10**9, tuple(range(8)), 2, None)
    across = Collective("all-gather", 10**9, (0, 8), 2, None)
    flops = {"bf16": chip.narrow_flops / 50, "f32": chip.wide_flops / 50}
    costs = ProgramCosts(flops, memory_bytes=chip.memory_rate / 100, collectives=[inside])
    times = roofline(costs, chip)
    assert times.compute == pytest.approx(0.04) and times.memory == pytest.approx(0.01)
    assert times.communication == pytest.approx(2 * 0.875e9 / 450e9) and times.limit == "compute"
    costs.collectives.append(across)
    times = roofline(costs, chip)
    assert times.communication == pytest.approx(2 * 0.875e9 / 450e9 + 2 * 0.5e9 / 50e9)
    assert times.seconds == max(times.compute, times.communication)
