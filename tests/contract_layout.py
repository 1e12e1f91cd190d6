"""Design rules of the tree: dependency direction, budgets, names, no private JAX, a light import."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "jaxcl").rglob("*.py"))
LAYERS = (
    {"types", "tree", "random", "schema", "kernels"},
    {
        "grad",
        "losses",
        "ridge",
        "memory",
        "optim",
        "vocabulary",
        "schedules",
        "mesh",
        "compose",
        "frozen",
        "guard",
        "alignment",
        "selection",
        "slices",
    },
    {"models"},
    {"methods"},
    {"data", "rl"},
    {"forgetting", "stability", "online", "seeds", "flops", "scores", "generate"}
    | {"metrics", "progress", "console", "certify"},
    {"folder", "report", "checkpoint", "saved", "manifests", "checksum", "distributed", "allocator", "hf"}
    | {"goodput", "watch", "retry"},
    {"network", "adapters", "domains", "practice"},
    {"plan", "feed"},
    {"program", "train", "weights"},
    {"sweep", "main", "branch", "merge", "bpe", "evaluate", "aot", "commands", "rerun"},
)
IO_LAYERS = {"train", "program", "folder", "progress", "checkpoint", "metrics", "report", "distributed", "data", "hf"}
IO_LAYERS |= {"main", "sweep", "branch", "bpe", "console", "manifests", "saved", "weights", "evaluate", "commands"}
IO_LAYERS |= {"goodput", "watch", "retry", "merge", "rerun"}
BANNED_NAMES = {"utils", "helpers", "common", "manager", "misc"}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "jaxcl").with_suffix("").parts
    return "commands" if parts[-1] == "__main__" else parts[0]  # a command may use everything


def layer_of(name: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if name in layer)


def imports(path: Path):
    """Yields the dotted name of everything the file imports, with jaxcl submodules resolved."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if node.module == "jaxcl":
                yield from (f"jaxcl.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_file_keeps_to_the_design(path):
    source = path.read_text()
    tree = ast.parse(source)
    assert ast.get_docstring(tree), "the first line says what the file is"
    assert len(source.splitlines()) <= 400
    assert path.stem not in BANNED_NAMES
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno + 1 <= 60, f"{node.name} is longer than 60 lines"
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            assert not node.name.endswith(("Wrapper2", "Manager", "V2", "_v2")), node.name
        if isinstance(node, ast.Global):
            pytest.fail(f"module-level mutable state: global {node.names}")
    for name in imports(path):
        assert not name.startswith("jax._src"), name
        assert name not in ("jax.experimental.pjit", "jax.experimental.shard_map"), name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_dependencies_point_one_way(path):
    own = module_of(path)
    if own == "__init__":
        return
    for name in imports(path):
        if name.startswith("jaxcl."):
            target = name.split(".")[1]
            assert target == own or layer_of(target) <= layer_of(own), f"{own} imports {target}"
            if own == "methods":
                assert target not in {"train", "data", "checkpoint", "mesh", "distributed"}
            if own == "kernels":
                assert target == "kernels"
        if name.split(".")[0] == "ml_collections":
            assert path.stem == "main"


def test_only_io_modules_open_files():
    for path in FILES:
        if module_of(path) in IO_LAYERS or path.stem == "schema":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("open", "print", "input", "exec", "eval"), f"{path}: {node.func.id}()"


def test_no_pickle_anywhere():
    for path in FILES:
        for name in imports(path):
            assert name.split(".")[0] not in ("pickle", "dill", "cloudpickle", "shelve", "marshal"), path


def test_configs_are_short():
    for path in (ROOT / "configs").glob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 80, path
        docstring = ast.get_docstring(ast.parse(text)) or ""
        assert "python -m jaxcl.main" in docstring, f"{path}: the docstring names the command"


def test_experiments_keep_the_budgets():
    for path in (ROOT / "experiments").rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert len(path.read_text().splitlines()) <= 400, path
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno + 1 <= 60, f"{path}: {node.name}"


def test_import_is_light():
    """`import jaxcl` and its core cost < 0.5 s of processor time beyond jax and load no other framework."""
    script = (
        "import time, sys, jax, jax.numpy; t = time.process_time();"
        "import jaxcl, jaxcl.types, jaxcl.tree, jaxcl.random, jaxcl.schema;"
        "heavy = [m for m in ('torch', 'tensorflow', 'wandb', 'matplotlib') if m in sys.modules];"
        "print(time.process_time() - t, heavy)"
    )
    began = time.monotonic()
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    seconds, heavy = run.stdout.split(maxsplit=1)
    assert float(seconds) < 0.5, f"{seconds} s of {time.monotonic() - began:.1f} s"
    assert heavy.strip() == "[]"
