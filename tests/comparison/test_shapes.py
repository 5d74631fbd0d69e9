"""What `--shapes` stands for."""

import pytest

from zzhnet_jax.comparison.shapes import parse_shapes
from zzhnet_jax.errors import ConfigError


def sizes(*texts):
    return [shape[1:] for shape in parse_shapes(texts)]


def test_a_network_stands_for_its_stages():
    tiny = [(1, 4096, 768, 4, 1), (1, 1024, 1536, 4, 1), (1, 256, 3072, 4, 1), (1, 64, 6144, 4, 1)]
    assert sizes("vmamba_tiny@256") == tiny == sizes("mambabcd_tiny@256")
    assert parse_shapes(["vmamba_tiny@256"])[0].name == "vmamba_tiny_s2l5@256 stage 1"
    assert sizes("vmamba_tiny_vanilla@100")[0] == (1, 625, 768, 4, 16)
    assert [size[1] for size in sizes("vmamba_tiny@100")] == [625, 169, 49, 16]
    assert sizes("zzhnet_nano@64")[0] == (1, 256, 64, 4, 1)


def test_five_numbers_stand_for_themselves():
    assert sizes("2,70,8,3,4", "1,1,1,1,1") == [(2, 70, 8, 4, 3), (1, 1, 1, 1, 1)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("vmamba_tiny@", "NETWORK@SIZE"),
        ("vmamba_tiny@0", "NETWORK@SIZE"),
        ("1,2,3,4", "b,l,d,n,g"),
        ("1,2,3,4,x", "b,l,d,n,g"),
        ("1,0,4,1,1", "positive"),
        ("1,8,6,1,4", "multiple of g"),
        ("vmamba_tiny_m2@64", "with selective scans"),
        ("vmambo_tiny@64", "did you mean vmamba_tiny"),
    ],
)
def test_what_is_neither_is_told(text, said):
    with pytest.raises(ConfigError, match=said):
        parse_shapes([text])


def test_networks_run_the_scans_that_their_names_stand_for(monkeypatch):
    """Lengths, channels over all routes and states are those that the network calls with."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import zzhnet_jax.models.vssm.scans as scans
    from zzhnet_jax import create_model

    called = []
    plain = scans.selective_scan_2d

    def recording(u, delta, A, *others, **options):
        b, h, w, d = u.shape
        called.append((b, h * w, A.shape[0] * d, A.shape[0], A.shape[2]))
        return plain(u, delta, A, *others, **options)

    monkeypatch.setattr(scans, "selective_scan_2d", recording)
    model = create_model("vmamba_tiny_s2l5", rngs=nnx.Rngs(0), depths=(1, 1, 1, 1))
    jax.eval_shape(model, jax.ShapeDtypeStruct((1, 72, 72, 3), jnp.float32))
    assert called == sizes("vmamba_tiny@72")
