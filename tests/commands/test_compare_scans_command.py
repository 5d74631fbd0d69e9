"""`zzhnet compare-scans`: tables, files, exit codes; scans that are right, wrong or absent."""

import json
import re

import jax
import jax.numpy as jnp
import pytest

from zzhnet_jax.cli import main
from zzhnet_jax.comparison import sweep
from zzhnet_jax.kernels.selective_scan.api import IMPLEMENTATIONS
from zzhnet_jax.kernels.selective_scan.base import Implementation

SMALL = ("--shapes", "1,40,4,2,2", "--repeats", "1")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No half a gigabyte for the bandwidth of a test machine."""
    monkeypatch.setattr("zzhnet_jax.commands.compare_scans.measure_bandwidth", lambda: 10.0)


@pytest.fixture
def others(monkeypatch):
    """Two more implementations: one whose state leaks a little, one that cannot run."""
    right = IMPLEMENTATIONS["sequential"].scan

    def wrong(u, delta, A, *others, **flags):
        return right(u, delta, A * (1 + 1e-4), *others, **flags)

    monkeypatch.setitem(IMPLEMENTATIONS, "wrong", Implementation(wrong))
    absent = Implementation(right, unavailable=lambda: "it needs a quantum computer")
    monkeypatch.setitem(IMPLEMENTATIONS, "absent", absent)
    narrow = Implementation(right, unsupported=lambda u, *_: "u is too wide")
    monkeypatch.setitem(IMPLEMENTATIONS, "narrow", narrow)


def compare(*argv):
    return main(["compare-scans", *map(str, argv)])


def test_everything_that_was_measured_is_told(tmp_path, capsys, others):
    files = [tmp_path / "new" / name for name in ("out.json", "out.md")]
    names = ("sequential", "chunked", "absent", "narrow")
    argv = ["--implementations", *names, "--cases", "bf16", "--grad"]
    code = compare(*SMALL, *argv, "--json", files[0], "--markdown", files[1])
    out = capsys.readouterr().out
    assert code == 0, out
    assert max(map(len, out.splitlines()[5:])) <= 100 or str(tmp_path) in out
    assert "…" not in out and "Tolerance:" in out and "2^-24" in out
    assert "absent not run: it needs a quantum computer" in out
    assert "narrow not run: u is too wide" in out
    assert re.search(r"^ ?sequential .* pass", out, flags=re.MULTILINE)

    told = json.loads(files[0].read_text())
    assert told["passed"] is True and told["bandwidth_gb_s"] == 10
    assert [(scan["name"], scan["dtype"]) for scan in told["scans"]] == [
        ("1,40,4,2,2", "float32"),
        ("bf16", "bfloat16"),
    ]
    rows = {row["implementation"]: row for row in told["scans"][0]["rows"]}
    assert [rows[name]["verdict"] for name in names] == ["pass", "pass", "not run", "not run"]
    results = {"y", "state", "u", "delta", "A", "B", "C", "D", "delta_bias"}
    for name in names[:2]:
        assert set(rows[name]["errors"]) == results
        assert 0 < rows[name]["errors"]["y"]["max_abs"] < 1e-5
        assert [piece["last"] for piece in rows[name]["growth"]] == [16, 40]
        for program in ("forward", "gradient"):
            cost = rows[name][program]
            assert cost["run_ms"] > 0 and cost["compile_s"] > 0 and cost["runs"] == 1
            assert cost["gb_s"] == pytest.approx(cost["traffic_bytes"] / cost["run_ms"] / 1e6)
    u, B, parameters, state = 40 * 4, 40 * 2 * 2, 4 * 2 + 4 + 4, 4 * 2
    moved = 4 * (3 * u + 2 * B + parameters + state)
    assert rows["chunked"]["forward"]["traffic_bytes"] == moved
    assert rows["chunked"]["gradient"]["traffic_bytes"] == 4 * (5 * u + 4 * B + 2 * parameters)

    text = files[1].read_text()
    assert "gradient of delta_bias" in text and "## bf16" in text and "| chunked | pass |" in text


def test_a_wrong_scan_fails(capsys, others):
    assert compare(*SMALL, "--cases", "--implementations", "wrong", "chunked") == 1
    out = capsys.readouterr().out
    assert re.search(r"^ ?wrong .* FAIL", out, flags=re.MULTILINE)
    assert re.search(r"^ ?chunked .* pass", out, flags=re.MULTILINE)


def test_one_that_breaks_down_fails(capsys, monkeypatch):
    def breaking(*operands, **flags):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory\nmore")

    monkeypatch.setitem(IMPLEMENTATIONS, "breaking", Implementation(breaking))
    assert compare(*SMALL, "--cases", "--implementations", "breaking", "sequential") == 1
    out = capsys.readouterr().out
    assert "breaking FAIL: RESOURCE_EXHAUSTED: no memory\n" in out
    assert re.search(r"^ ?sequential .* pass", out, flags=re.MULTILINE)


def test_half_precision_on_request(capsys, tmp_path):
    path = tmp_path / "x.json"
    argv = ["--dtypes", "float16", "bfloat16", "--implementations", "sequential", "--cases"]
    assert compare(*SMALL, *argv, "--json", path) == 0
    told = json.loads(path.read_text())
    assert [scan["dtype"] for scan in told["scans"]] == ["float16", "bfloat16"]


def test_too_large_for_the_machine(capsys, monkeypatch):
    monkeypatch.setattr("zzhnet_jax.comparison.compare.free_bytes", lambda: 10)
    assert compare(*SMALL, "--implementations", "sequential", "--cases") == 0
    assert "sequential not run: needs 0.0 GB, 0.0 GB are free" in capsys.readouterr().out


def test_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "LENGTHS", (16, 64))
    path = tmp_path / "plot.svg"
    argv = ["--implementations", "sequential", "--cases", "--plot", path, "--grad"]
    assert compare(*SMALL, *argv) == 0
    text = path.read_text()
    for words in ("sequential", "sequence length (steps)", "time (ms)", "relative error"):
        assert words in text
    assert text.count("Time of the") == 2


def test_ahead_of_time_says_what_to_install(monkeypatch, capsys, others):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    names = [name for name in ("pallas_tpu", "pallas_gpu") if name in IMPLEMENTATIONS]
    assert compare(*SMALL, "--implementations", *names, "sequential", "--cases", "--aot") == 0
    out = capsys.readouterr().out
    assert "pip install" in out and "libtpu" in out and "triton" in out


def test_recorded_by_torch(tmp_path, capsys):
    """A row of PyTorch's beside the others, from a file of the script's format."""
    import numpy as np

    from zzhnet_jax.comparison import dump_torch_scan
    from zzhnet_jax.comparison.cases import make_case
    from zzhnet_jax.comparison.oracle import reference
    from zzhnet_jax.kernels.selective_scan.shapes import ScanShape

    case = make_case(ScanShape("", 1, 40, 4, 2, 2))
    values = reference(case, gradients=True).values
    arrays = {f"0/in/{name}": x for name, x in case.arguments.items()}
    arrays |= {f"0/grad/{name}": values[name].astype(np.float32) for name in case.arguments}
    arrays |= {"0/cot": case.cotangent, "0/out/y": values["y"].astype(np.float32)}
    times = {"forward": 0.5, "gradient": 1.5}
    facts = {"dtype": "float32", "y_dtype": "float32", "milliseconds": times}
    meta = {"format": dump_torch_scan.FORMAT, "kernel": "mamba_ssm", "torch": "2.9"}
    meta |= {"device": "H100", "scans": [facts | {"shape": (1, 40, 4, 2, 2)}]}
    path = tmp_path / "scans.npz"
    np.savez(path, meta=json.dumps(meta), **arrays)
    argv = ["--from-torch", path, "--implementations", "chunked", "--cases", "--repeats", "1"]
    assert compare(*argv, "--grad") == 0
    out = capsys.readouterr().out
    assert "torch 2.9, mamba_ssm on H100" in out
    assert re.search(r"^ ?torch .*0\.5 .* pass", out, flags=re.MULTILINE)
    arrays["0/out/y"] = arrays["0/out/y"] + jnp.float32(1e-3)
    np.savez(path, meta=json.dumps(meta), **arrays)
    assert compare(*argv) == 1
    assert re.search(r"^ ?torch .* FAIL", capsys.readouterr().out, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--shapes", "1,2,3"], "--shapes = '1,2,3'"),
        (["--implementations", "chunkd"], "--implementations = 'chunkd'"),
        (["--cases", "easy"], "--cases = 'easy'"),
        (["--dtypes", "float64"], "float64"),
        (["--dtypes"], "--dtypes"),
        (["--plot", "x.txt"], "--plot = 'x.txt'"),
        (["--repeats", "0"], "--repeats = 0"),
        (["--from-torch", "nowhere.npz"], "nowhere.npz"),
        (["--from-torch", "pyproject.toml", "--cases"], "pyproject.toml"),
        (["--grda"], "--grad"),
    ],
)
def test_mistakes_are_one_line(argv, said, capsys):
    assert compare(*argv) == 2
    out, err = capsys.readouterr()
    assert said in err and err.startswith("error: ") and err.count("\n") == 1
    assert out == ""


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        compare("--help")
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("--from-torch", "very_long", "NETWORK@SIZE", "--aot"))
