"""The README's promises that a machine can check: its example is a working method, its files exist."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import toys

from jaxcl import compose, tree
from jaxcl.methods import cpt

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_the_example_method_pulls_towards_the_mean():
    code = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert code
    space = {}
    exec(compile(code.group(1), "README.md", "exec"), space)
    assert len(code.group(1).splitlines()) <= 30
    setting, batch = toys.setting(), toys.text(0)
    plain = compose.compose([("cpt", cpt.make(setting))], setting)
    mine = compose.compose([("mine", space["make"](setting, strength=1.0, rate=0.0))], setting)
    params = setting.model.init(jax.random.key(0))
    way = []
    for method in (plain, mine):
        state = method.init(jax.tree.map(jnp.array, params))
        step = jax.jit(method.step)
        for i in range(10):
            state, metrics = step(state, batch, jax.random.key(i))
        way.append(float(tree.norm(tree.add(state.params, params, -1.0))))
    assert np.isfinite(float(metrics["mine"]))
    assert 0 < way[1] < way[0]


def test_the_example_of_boxes_ends_in_a_certificate(capsys):
    text = (ROOT / "experiments" / "hyperinterval" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code
    exec(compile(code.group(1), "README.md", "exec"), {})
    assert capsys.readouterr().out == "1.0\n"


def test_files_and_methods_that_it_names_exist():
    for name in re.findall(r"(?:configs|experiments|jaxcl)/[\w/.]+", TEXT):
        if name not in ("jaxcl/methods/mine.py",):
            assert (ROOT / name.rstrip(".")).exists(), name
    for path in (ROOT / "jaxcl" / "methods").glob("[a-z]*.py"):
        assert f"`{path.stem}`" in TEXT, f"{path.stem} is not in the table of methods"
