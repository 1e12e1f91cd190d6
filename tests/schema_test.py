"""Configuration schemas: names, types, the expression form of a method."""

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcl import schema


def example(first, *, rows: int, rate: float = 0.1, mode: Literal["a", "b"] = "a", names: tuple[str, ...] = ()):
    return first, rows, rate, mode, names


def test_call_passes_values_through():
    assert schema.call(example, {"rows": 3, "rate": 1, "names": ["x"]}, 0, field="f") == (0, 3, 1, "a", ["x"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 1, "rat": 2.0}, "config.f.rat: unknown key; did you mean 'rate'?"),
        ({"rows": "1"}, "config.f.rows='1': expected int, got str"),
        ({"rows": True}, "config.f.rows=True: expected int, got bool"),
        ({"rows": 1.0}, "config.f.rows=1.0: expected int, got float"),
        ({"rows": 1, "rate": "nan"}, "config.f.rate=nan: must be a finite number"),
        ({"rows": "-Inf"}, "config.f.rows=-Inf: must be a finite number"),
        ({"rows": 1, "rate": "nano"}, "config.f.rate='nano': expected float, got str"),
        ({"rows": 1, "mode": "inf"}, "config.f.mode='inf': expected 'a' or 'b', got str"),
        ({"rows": 1, "mode": "c"}, "config.f.mode='c': expected 'a' or 'b', got str"),
        ({"rows": 1, "names": [1]}, "config.f.names=[1]: expected"),
        ({"rows": 1, "names": "one"}, "config.f.names='one': expected a list, as in ['one'], got str"),
        ({}, "config.f.rows: missing"),
    ],
)
def test_bad_options_name_the_field(options, message):
    with pytest.raises(schema.UserError) as caught:
        schema.call(example, options, 0, field="f")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_make_names_the_nearest_module():
    with pytest.raises(schema.UserError, match=r"config.model.name='transfomer': .*did you mean 'transformer'"):
        schema.make("jaxcl.models", {"name": "transfomer"}, field="model")
    with pytest.raises(schema.UserError, match="expected a dict with a 'name'"):
        schema.make("jaxcl.models", {"vocab": 3}, field="model")


@pytest.mark.parametrize("name", ["lora", "bridge", "weight_boxes", "nothing like it"])
def test_what_is_listed_are_the_modules_that_can_be_named(name):
    """Adapters need a model first, and some modules make nothing."""
    with pytest.raises(schema.UserError, match=rf"name='{name}'.*; choose from cnn, mlp, patches, transformer$"):
        schema.make("jaxcl.models", {"name": name}, field="model")
    with pytest.raises(schema.UserError, match=r"name='questions': does not stand alone"):
        schema.make("jaxcl.rl.tasks", {"name": "questions"}, field="task")


def test_parse_reads_names_options_and_sums():
    parts = schema.parse("er(rows=256, fraction=.25) + reptile(every=10,keep=0.5)+cpt", field="method")
    assert parts == [
        {"name": "er", "rows": 256, "fraction": 0.25},
        {"name": "reptile", "every": 10, "keep": 0.5},
        {"name": "cpt"},
    ]


@pytest.mark.parametrize(
    "text", ["", "er(", "er(3)", "er - ewc", "er(**x)", "er(rows=open('f'))", "__import__('os').x"]
)
def test_parse_refuses_everything_else(text):
    with pytest.raises(schema.UserError, match=r"config.method="):
        schema.parse(text, field="method")


@given(
    st.dictionaries(st.sampled_from(["a", "bb", "c_1"]), st.one_of(st.integers(), st.booleans(), st.text(), st.none()))
)
def test_parse_inverts_printing(options):
    text = "er(" + ", ".join(f"{key}={value!r}" for key, value in options.items()) + ")"
    assert schema.parse(text, field="method") == [{"name": "er", **options}]
