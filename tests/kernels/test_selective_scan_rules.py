"""Which implementation runs: by the platform of the lowering, by shape and dtype, and as asked."""

import logging

import jax
import jax.numpy as jnp
import pytest

from zzhnet_jax.kernels.selective_scan import ShapeError, Tile, UnavailableError, selective_scan
from zzhnet_jax.kernels.selective_scan.api import IMPLEMENTATIONS
from zzhnet_jax.kernels.selective_scan.rules import RULES, Choice, Chosen, _tell, choose

TPU_CALL, GPU_CALL = "tpu_custom_call", "__gpu$xla.gpu.triton"


def operands(length=16, n=1, dtype=jnp.float32, groups=1):
    struct = jax.ShapeDtypeStruct
    sequence, matrix = struct((2, length, 8), dtype), struct((2, length, groups, n), dtype)
    return sequence, sequence, struct((8, n), dtype), matrix, matrix, struct((8,), dtype)


def gradient(implementation=None):
    def loss(*x):
        y = selective_scan(*x, delta_softplus=True, implementation=implementation)
        return jnp.sum(jnp.sin(y.astype(jnp.float32)))

    return jax.jit(jax.grad(jax.checkpoint(loss), argnums=range(6)))


def test_the_platform_is_that_of_the_lowering():
    """A process without accelerator lowers for all; programs for CPUs hold nothing of the rest."""
    traced = gradient().trace(*operands())
    count = {
        platform: [
            traced.lower(lowering_platforms=(platform,)).as_text().count(call)
            for call in (TPU_CALL, GPU_CALL)
        ]
        for platform in ("cpu", "tpu", "cuda", "rocm")
    }
    assert count["cpu"] == count["rocm"] == [0, 0]
    assert count["tpu"][0] >= 2 and count["tpu"][1] == 0
    assert count["cuda"][0] == 0 and count["cuda"][1] >= 2


def test_the_program_for_cpus_is_that_of_chunked():
    """Neither memory nor work comes from the branches that other platforms would take."""
    automatic, named = (gradient(name).lower(*operands()).compile() for name in (None, "chunked"))
    for of in ("temp_size_in_bytes", "argument_size_in_bytes", "output_size_in_bytes"):
        assert getattr(automatic.memory_analysis(), of) == getattr(named.memory_analysis(), of)
    assert automatic.cost_analysis()["flops"] == named.cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("given", "platforms"),
    [
        (dict(), ("tpu", "cuda")),
        (dict(n=64, dtype=jnp.bfloat16), ("tpu", "cuda")),
        (dict(n=65), ()),
        (dict(length=4), ()),
        (dict(dtype=jnp.float64), ()),
    ],
)
def test_shape_and_dtype_decide(given, platforms):
    with jax.enable_x64(True):
        choice = choose(IMPLEMENTATIONS, (*operands(**given), None, None))
    assert choice.default == Chosen("chunked")
    assert tuple(platform for platform, _ in choice.on_platform) == platforms


def test_every_rule_names_an_implementation():
    assert {rule.implementation for rule in RULES} <= set(IMPLEMENTATIONS)
    assert all(rule.reason for rule in RULES)


def test_a_choice_is_logged_once(caplog):
    _tell.cache_clear()
    with caplog.at_level(logging.INFO, "zzhnet_jax"):
        for n in (1, 1, 2, 65, 65):
            choose(IMPLEMENTATIONS, (*operands(n=n), None, None))
    first, second = (x.getMessage() for x in caplog.records)
    assert first == (
        "selective_scan runs pallas_tpu on tpu, pallas_gpu on cuda, chunked on other platforms"
    )
    assert second.startswith("selective_scan runs chunked; not pallas_tpu on tpu: ")


class TestNamed:
    def test_what_it_cannot_take(self, monkeypatch):
        item = IMPLEMENTATIONS["sequential"]
        narrow = type(item)(item.scan, unsupported=lambda u, *_: f"u is {u.dtype}")
        monkeypatch.setitem(IMPLEMENTATIONS, "narrow", narrow)
        message = r"'narrow' cannot take these operands: u is float32; available: sequential, assoc"
        with pytest.raises(UnavailableError, match=message):
            jax.eval_shape(lambda *x: selective_scan(*x, implementation="narrow"), *operands())

    def test_on_another_machine(self):
        with pytest.raises(UnavailableError, match=r"'pallas_tpu' cannot run here: .* TPU"):
            jax.eval_shape(lambda *x: selective_scan(*x, implementation="pallas_tpu"), *operands())

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            (None, r"tile = Tile\(steps=4.*\): it needs an implementation, named"),
            ("sequential", r"tile = Tile\(steps=4.*\): implementation 'sequential' has no blocks"),
        ],
    )
    def test_a_tile_without_blocks(self, name, message):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(
                lambda *x: selective_scan(*x, implementation=name, tile=Tile(4)), *operands()
            )

    def test_a_tile_arrives(self, monkeypatch):
        seen = []

        def scan(*x, tile=None, **flags):
            seen.append(tile)
            return IMPLEMENTATIONS["sequential"].scan(*x, **flags)

        item = type(IMPLEMENTATIONS["sequential"])(scan, tiled=True)
        monkeypatch.setitem(IMPLEMENTATIONS, "tiled", item)
        x = [jnp.ones(s.shape) for s in operands()]
        for tile in (Tile(4), None, Tile(4)):
            selective_scan(*x, implementation="tiled", tile=tile)
        assert seen == [Tile(4), None]  # the third call was compiled before

    def test_axis_without_shard_map(self):
        message = r"axis_name = 'space': expected an axis of shard_map \(there is no surrounding"
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda *x: selective_scan(*x, axis_name="space"), *operands())

    def test_shapes_are_checked_first(self):
        u, _, A, B, C, D = operands()
        with pytest.raises(ShapeError, match="delta has shape"):
            jax.eval_shape(lambda *x: selective_scan(*x), u, A, A, B, C, D)


def test_choice_is_hashable():
    assert len({Choice(Chosen("a")), Choice(Chosen("a")), Choice(Chosen("a", Tile(1)))}) == 2
