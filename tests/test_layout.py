"""The package's structure: which part may import which, and what the wheel carries."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A part may import the parts below it, and itself.
LAYERS = [
    {"kernels"},
    {"errors"},
    {"data"},
    {"models", "evaluation", "aot"},
    {"training", "inference", "conversion", "comparison"},
    {"commands"},
    {"cli"},
]
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
# models and evaluation stand beside data in the design, inference serves the training loop's
# validation, and conversion reads what training wrote.
KERNELS_MAY_IMPORT = {"jax", "numpy", "jaxtyping", "triton", "jax_triton"}
# Triton compiles functions of modules: these hold nothing else, and are imported in functions.
TRITON_MODULES = {"triton_kernels.py", "triton_kernels_vjp.py"}
OPTIONAL = {"torch", "triton", "jax_triton", "rasterio", "tensorflow_datasets", "tensorflow"}


def python_files(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.rglob("*.py")) if "zzhnet_jax/kernels" not in str(p)]


def imported(tree: ast.AST, *, top_level_only: bool = False) -> set[str]:
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    return names


def test_dependencies_point_down():
    wrong = []
    for path in python_files(ROOT / "zzhnet_jax"):
        part = path.relative_to(ROOT / "zzhnet_jax").parts[0].removesuffix(".py")
        for name in imported(ast.parse(path.read_text())):
            if name.startswith("zzhnet_jax.") and part in RANK:
                other = name.split(".")[1]
                if RANK.get(other, -1) > RANK[part]:
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_kernels_import_nothing_but_jax():
    files = python_files(ROOT / "kernels")
    assert files
    for path in files:
        roots = {name.split(".")[0] for name in imported(ast.parse(path.read_text()))}
        extra = roots - KERNELS_MAY_IMPORT - set(sys.stdlib_module_names)
        assert not extra, f"{path.relative_to(ROOT)} imports {extra}"


def test_optional_packages_are_imported_where_they_are_used():
    for path in [*python_files(ROOT / "zzhnet_jax"), *python_files(ROOT / "kernels")]:
        if path.name in TRITON_MODULES:
            continue
        tops = imported(ast.parse(path.read_text()), top_level_only=True)
        early = {name.split(".")[0] for name in tops} & OPTIONAL
        assert not early, f"{path.relative_to(ROOT)} imports {early} on import"


def test_data_does_not_import_jax():
    code = "import sys, zzhnet_jax.data, zzhnet_jax.data.pipeline; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


@pytest.mark.slow
def test_wheel_holds_the_kernels_inside_the_package(tmp_path):
    """PyPI has a package called `kernels`: ours must not land beside it."""
    import zipfile

    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", tmp_path, ROOT]
    subprocess.run(command, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"zzhnet_jax"}
    expected = {
        str(Path("zzhnet_jax") / path.relative_to(ROOT / folder))
        for folder in ("zzhnet_jax", ".")
        for path in [*(ROOT / "zzhnet_jax").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
        if path.is_relative_to(ROOT / folder)
        and (folder == ".") == ("kernels" in path.parts)
        and "zzhnet_jax/kernels" not in str(path)
    }
    assert expected <= set(names)
