"""Trees of calls: what is taken apart is put together again, and what differs is named."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_compiler.sampling import call_tree
from mpq_compiler.sampling.call_tree import Argument, CallForm
from mpq_compiler.support.errors import UserError

leaves = st.one_of(
    st.booleans(), st.integers(-9, 9), st.floats(allow_nan=False), st.text(max_size=3),
    st.builds(np.full, st.just((2, 3)), st.integers(0, 9)),
)  # fmt: skip
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, max_size=3),
        st.dictionaries(st.integers(0, 9), inner, min_size=1, max_size=2),
    ),
    max_leaves=8,
)
calls = st.dictionaries(st.text("xyz", min_size=1, max_size=2), values, max_size=3)


def same(a, b) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and np.array_equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@given(calls)
def test_what_is_taken_apart_is_put_together_again(call):
    tree, tensors = call_tree.flatten(call)
    assert same(call_tree.unflatten(tree, tensors), call)
    assert call_tree.paths(tree) == [*tensors]
    assert json.loads(json.dumps(tree)) == tree
    assert call_tree.difference(tree, tree) is None


@given(calls, calls)
def test_calls_of_equal_trees_do_not_differ(a, b):
    first, second = (call_tree.flatten(call)[0] for call in (a, b))
    assert (call_tree.difference(first, second) is None) == (first == second and str(first) == str(second))


@pytest.mark.parametrize(
    ("call", "other", "clause"),
    [
        ({"x": 1}, {"x": 2}, "'x' is 1, and was 2 when it was compiled"),
        ({"x": True}, {"x": 1}, "'x' is True, and was 1 when it was compiled"),
        ({"x": [1]}, {"x": (1,)}, "'x' is a list of 1, and was a tuple of 1 when it was compiled"),
        ({"x": [1, 2]}, {"x": [1]}, "'x' is a list of 2, and was a list of 1 when it was compiled"),
        ({"x": {"a": 1}}, {"x": {"a": 1, "b": 2}}, "'x.b' is missing"),
        ({"x": {"ab": 1}}, {"x": {}}, "'x.ab' was not given when it was compiled"),
        ({"scal": 1.0}, {"scale": 1.0}, "'scal' was not given when it was compiled: did you mean 'scale'?"),
        ({"x": np.ones(1)}, {"x": None}, "'x' was not given when it was compiled"),
        ({"x": np.ones(1)}, {"x": 3}, "'x' is a tensor, and was 3 when it was compiled"),
    ],
)
def test_the_first_difference_is_named(call, other, clause):
    trees = [call_tree.flatten(c)[0] for c in (call, other)]
    assert call_tree.difference(*trees) == clause


def test_what_no_tree_can_hold_is_refused_by_its_path():
    with pytest.raises(UserError, match=r"'a\.0' is a object: a call holds tensors, numbers"):
        call_tree.flatten({"a": [object()]})
    with pytest.raises(UserError, match="'a' has the key 0: keys are strings, or integers"):
        call_tree.flatten({"a": {0: 1, "b": 2}})


def test_defaults_and_none_count_as_not_given():
    given = {"a": None, "b": True, "c": 3, "d": 1}
    assert call_tree.without(given, {"b": True, "c": 2, "d": True}) == {"c": 3, "d": 1}


@pytest.mark.parametrize(
    ("rows", "given", "batch", "shape"),
    [
        (1, (3, 5), 3, (3, 5)),
        (1, (1, 5), 3, (3, 5)),
        (0, (), 3, (3,)),
        (0, (4,), 2, (2, 4)),
        (4, (12, 5), 3, (3, 4, 5)),
    ],
)
def test_inputs_have_a_row_for_each_sample(rows, given, batch, shape):
    argument = Argument("x", "x", rows)
    value = np.arange(np.prod(given, dtype=int), dtype=np.float32).reshape(given)
    found = argument.rows_of(value, batch)
    assert found.shape == shape
    if rows == 4:
        assert np.array_equal(argument.given(found), value)


def test_rows_that_are_no_samples_are_refused():
    with pytest.raises(UserError, match="'x' has 7 rows, and 2 samples have 8"):
        Argument("x", "x", 4).rows_of(np.ones((7, 3)), 2)


FORM = CallForm(
    tree={"dict": {"x": {"tensor": "x"}, "t": {"tensor": "t"}, "ids": {"tensor": "ids"}, "scale": {"value": 2}}},
    arguments=(Argument("x", "x"), Argument("t", "timestep", 0)),
    outputs={"tuple": [{"tensor": "0"}, {"list": [{"tensor": "1.0"}]}]},
    shapes={"0": (2, 3), "1.0": (4,)},
    defaults={"scale": 1},
    latent="x",
    time="t",
)


def test_a_form_is_plain_data():
    assert CallForm.from_json(json.loads(json.dumps(FORM.to_json()))) == FORM


def test_a_call_is_taken_and_answered_in_its_form():
    x, ids = np.ones((5, 7), np.float32), np.arange(6)
    inputs, constants = FORM.taken({"x": x, "t": np.float32(3), "ids": ids, "scale": 2, "other": None})
    assert inputs["x"] is x and inputs["timestep"].tolist() == [3.0] * 5 and constants == {"ids": ids}
    output = np.arange(50, dtype=np.float32).reshape(5, 10)
    first, (second,) = FORM.returned(output)
    assert first.shape == (5, 2, 3) and second.shape == (5, 4)
    assert np.array_equal(np.concatenate([first.reshape(5, -1), second], 1), output)


def test_nothing_that_is_given_is_ignored():
    call = {"x": np.ones((5, 7)), "t": np.float32(3), "ids": np.arange(6), "scale": 2}
    for changed, said in (
        ({"extra": np.ones(5)}, "'extra' was not given when it was compiled"),
        ({"scale": 3}, "'scale' is 3, and was 2"),
        ({"scale": 1}, "'scale' is missing"),
    ):
        with pytest.raises(UserError, match=said):
            FORM.taken(call | changed)


def test_constants_are_compared():
    held = {"ids": np.arange(6)}
    call_tree.require_constants({"ids": np.arange(6, dtype=np.float32)}, held)
    for value, said in ((np.arange(5), r"\[6\], and is \[5\]"), (np.arange(6) + 1, "has other values now")):
        with pytest.raises(UserError, match=said):
            call_tree.require_constants({"ids": value}, held)
