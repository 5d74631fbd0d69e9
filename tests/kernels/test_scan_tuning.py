"""The autotuner and its file: what is recorded is what runs, and damage is told."""

import json

import jax.numpy as jnp
import pytest

from zzhnet_jax.kernels.selective_scan import Tile, UnavailableError, selective_scan
from zzhnet_jax.kernels.selective_scan import tuning as tuning_module
from zzhnet_jax.kernels.selective_scan.api import IMPLEMENTATIONS, choose_implementation
from zzhnet_jax.kernels.selective_scan.shapes import ScanShape
from zzhnet_jax.kernels.selective_scan.tiling import PATH_VARIABLE, read_tiles, record_tile
from zzhnet_jax.kernels.selective_scan.tuning import candidate_tiles, tune_tile

SHAPE = ScanShape("small", 1, 16, 4, 2, 1)


@pytest.fixture
def path(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "tiles.json"
    monkeypatch.setenv(PATH_VARIABLE, str(path))
    return path


def chosen(name="chunked", shape=SHAPE):
    _, b, length, d, groups, n = shape
    matrix = jnp.ones((b, length, groups, n))
    u = jnp.ones((b, length, d))
    operands = (u, u, jnp.ones((d, n)), matrix, matrix, None, None, None)
    return choose_implementation(name, operands).default


def test_the_fastest_is_recorded_and_runs(path, monkeypatch):
    times = {None: 3.0, 8: 2.0, 16: 1.0}

    def seconds(run, operands, repeats):
        return times[run]

    monkeypatch.setattr(tuning_module, "_gradient", lambda name, tile: tile and tile.steps)
    monkeypatch.setattr(tuning_module, "_seconds", seconds)
    best = tune_tile("chunked", SHAPE, candidates=[Tile(8), Tile(16), Tile(8, 2)])
    assert best == Tile(16)
    assert list(read_tiles(path).values()) == [Tile(16)]
    assert chosen().tile == Tile(16)
    assert chosen(shape=SHAPE._replace(length=8)).tile is None
    assert chosen(name=None).tile == Tile(16)

    times[None] = 0.5  # now the own choice wins, and the entry goes
    assert tune_tile("chunked", SHAPE, candidates=[Tile(8)]) is None
    assert chosen().tile is None


def test_real_runs_skip_what_fails(path, monkeypatch):
    def scan(*x, tile=None, **flags):
        if tile == Tile(16):
            raise NotImplementedError("no such block")
        return IMPLEMENTATIONS["sequential"].scan(*x, **flags)

    item = type(IMPLEMENTATIONS["sequential"])(scan, tiled=True)
    monkeypatch.setitem(IMPLEMENTATIONS, "picky", item)
    best = tune_tile("picky", SHAPE, candidates=[Tile(16), Tile(8)], repeats=1)
    assert best in (None, Tile(8))


def test_candidates_fit_the_shape():
    assert candidate_tiles("chunked", SHAPE) == [Tile(16)]
    large = SHAPE._replace(length=4096, channels=256)
    assert len(set(candidate_tiles("chunked", large))) > 20
    unrolled = candidate_tiles("pallas_gpu", large)
    assert max(tile.steps for tile in unrolled) == 8
    assert {tile.warps for tile in unrolled} == {1, 2, 4}


def test_entries_replace_and_keep(path):
    for key, tile in (("a", Tile(1)), ("b", Tile(2, 3, 4)), ("a", Tile(5)), ("c", None)):
        record_tile(path, key, tile)
    assert read_tiles(path) == {"a": Tile(5), "b": Tile(2, 3, 4)}
    assert json.loads(path.read_text())["b"] == {"steps": 2, "channels": 3, "warps": 4}
    assert [x.name for x in path.parent.iterdir()] == ["tiles.json"]


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": {"width": 3}}'])
def test_a_damaged_file_is_told(path, text):
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ValueError, match=r"tiles.json is no file of tiles .*: delete it"):
        chosen()


def test_wrong_requests(path, monkeypatch):
    with pytest.raises(UnavailableError, match="'cuda' cannot run here"):
        tune_tile("cuda", SHAPE)
    with pytest.raises(ValueError, match="'sequential' has no blocks to size"):
        tune_tile("sequential", SHAPE)
    monkeypatch.delenv(PATH_VARIABLE)
    with pytest.raises(ValueError, match=f"path = None: give one, or set {PATH_VARIABLE}"):
        tune_tile("chunked", SHAPE)
    u = jnp.ones((1, 3, 2))
    B = jnp.ones((1, 3, 1, 1))
    assert selective_scan(u, u, -jnp.ones((2, 1)), B, B).shape == u.shape
