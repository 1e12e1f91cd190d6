"""What no file of the package may do: load what can carry code, or run text."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "jaxcl").rglob("*.py"), *(ROOT / "tpu").rglob("*.py")])
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "torch"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {("os", "system"), ("os", "popen"), ("pandas", "read_pickle"), ("pd", "read_pickle"), ("runpy", "run_path")}
METHODS = {"extractall", "unpack_archive"}  # they write where the names in an archive say
# A name from a configuration becomes a module there: one of a package of ours, or the verifier that a user names.
IMPORTS = {"jaxcl/schema.py", "jaxcl/compose.py", "jaxcl/rl/verify.py"}


def faults(tree: ast.AST) -> list[str]:
    """Returns what the code does that may run code from a file, or from text."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            found += _of_call(node)
    return found


def _of_call(node: ast.Call) -> list[str]:
    named = {word.arg: word.value for word in node.keywords}

    def off(name: str) -> bool:
        return name not in named or (isinstance(named[name], ast.Constant) and not named[name].value)

    found = [f"{name}=" for name in ("allow_pickle", "shell", "trust_remote_code") if not off(name)]
    if None in named and isinstance(node.func, ast.Attribute) and node.func.attr in ("load", "read_array"):
        found.append("load(**options)")
    if isinstance(node.func, ast.Name) and node.func.id in BUILTINS:
        found.append(f"{node.func.id}()")
    if isinstance(node.func, ast.Attribute):
        owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
        if (owner, node.func.attr) in CALLS or node.func.attr in METHODS:
            found.append(f"{owner}.{node.func.attr}()")
        if owner in ("np", "numpy") and node.func.attr == "load" and len(node.args) > 2:  # the third is allow_pickle
            found.append("load(..., allow_pickle)")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_loaded_that_can_carry_code(path):
    tree = ast.parse(path.read_text())
    assert faults(tree) == []
    dynamic = any(isinstance(node, ast.Attribute) and node.attr == "import_module" for node in ast.walk(tree))
    assert dynamic == (str(path.relative_to(ROOT)) in IMPORTS)


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import torch.nn",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=given)",
        "np.load(path, None, True)",
        "np.load(path, **options)",
        "eval('1')",
        "__import__('os')",
        "os.system(command)",
        "subprocess.run(command, shell=True)",
        "archive.extractall(place)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_check_finds_it(code):
    assert faults(ast.parse(code))


def test_the_check_allows_what_is_harmless():
    code = (
        "np.load(path)\nnp.load(path, allow_pickle=False)\nre.compile('x')\njax.jit(f).lower().compile()\nmodel.eval()"
    )
    assert faults(ast.parse(code)) == []
