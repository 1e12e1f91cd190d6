"""The notebooks run from top to bottom."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RUN = """
import sys, nbformat, nbclient
book = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(book, timeout=400, kernel_name="python3").execute()
outputs = [out for cell in book.cells if cell.cell_type == "code" for out in cell.outputs]
for out in outputs:
    print(out.get("text", "") or out.get("data", {}).get("text/plain", ""))
"""
PRINTED = {"soft_rl": "pass@16", "hyperinterval": "every promise kept: True"}  # of those that compare no methods


QUICK = ("quickstart", "hyperinterval")
BOOKS = [
    pytest.param(path, id=path.stem, marks=[] if path.stem in QUICK else [pytest.mark.slow])
    for path in sorted((ROOT / "experiments").rglob("*.ipynb"))
]


@pytest.mark.parametrize("path", BOOKS)
def test_notebook_runs(path, tmp_path):
    environment = os.environ | {"JAXCL_STEPS": "4", "IPYTHONDIR": str(tmp_path), "JUPYTER_CONFIG_DIR": str(tmp_path)}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # a few steps: the compiler need not try
    environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "compiled")  # seeds are runs of one program
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    run = subprocess.run(
        [sys.executable, "-c", RUN, str(path)],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        cwd=path.parent,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert PRINTED.get(path.stem, "naive") in run.stdout, "the comparison is printed"
    assert "Warning" not in run.stdout


def test_notebooks_are_committed_without_outputs():
    for path in (ROOT / "experiments").rglob("*.ipynb"):
        assert '"outputs": [\n' not in path.read_text().replace('"outputs": []', ""), path
