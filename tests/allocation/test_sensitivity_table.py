from __future__ import annotations

import itertools
import math

import pytest

from mpq_compiler.allocation import pose, sensitivity_table
from mpq_compiler.allocation.pose import Terms, group_budgets, monotone
from mpq_compiler.allocation.problem import Problem
from mpq_compiler.allocation.sensitivity_table import CONTENT, QUALITY
from mpq_compiler.allocation.solver import solve
from mpq_compiler.driver import budgets
from mpq_compiler.support.errors import UserError

BITS = (2, 4, 8)
NAMES = ("a", "b", "c", "d")


def table(losses: list[dict[int, float]], activations: list[dict[int, float]] | None = None) -> dict:
    """Four layers of 100 to 400 weights, two of them content, each with an edge of 10 to 40 elements of its own."""
    activations = activations or [{8: 0.0} for _ in NAMES]
    sizes = {f"int{b}": {"bits": b} for b in BITS}
    layers = [
        {
            "name": name,
            "group": CONTENT if i % 2 else QUALITY,
            "weights": 100 * (i + 1),
            "edges": [f"x{name}"],
            "macs": 1,
            "formats": {f: s | {"bytes": s["bits"] * 100 * (i + 1) // 8} for f, s in sizes.items()},
        }
        for i, name in enumerate(NAMES)
    ]
    return {
        "parameters": 1000,
        "fixed_bytes": 0,
        "weights": {n: {f"int{b}": x for b, x in own.items()} for n, own in zip(NAMES, losses, strict=True)},
        "activations": {f"x{n}": {str(b): x for b, x in a.items()} for n, a in zip(NAMES, activations, strict=True)},
        "layers": layers,
        "elements": {f"x{name}": 10 * (i + 1) for i, name in enumerate(NAMES)},
    }


NOISY = [
    {2: 0.4, 4: 0.02, 8: 1e-5},
    {2: 0.1, 4: 0.03, 8: 1e-6},
    {2: 0.05, 4: 0.004, 8: 1e-5},
    {2: 0.3, 4: 0.01, 8: 1e-6},
]


@pytest.mark.parametrize("ratio", [0.25, 0.46, 1.0, 1.36, 4.0])
@pytest.mark.parametrize("content, quality", [(1, 1), (692, 308), (3, 1000)])
@pytest.mark.invariant("mixdq-6")
def test_budgets_of_groups_add_up_to_the_common_one(ratio, content, quality):
    """W_c B_c + W_q B_q = (W_c + W_q) B, and B_c = k B_q."""
    bits = 4.0
    shares = group_budgets(bits * (content + quality), {CONTENT: content, QUALITY: quality}, ratio)
    assert math.isclose(sum(shares.values()), bits * (content + quality))
    assert math.isclose(shares[CONTENT] / content, ratio * shares[QUALITY] / quality)
    r = content / quality
    assert math.isclose(shares[QUALITY] / quality, bits * (1 + r) / (ratio * r + 1))


@pytest.mark.parametrize("ratio", [0.6, 1.0, 1.5])
@pytest.mark.parametrize("decibels", [False, True])
@pytest.mark.invariant("mixdq-5")
def test_decoupled_programs_are_the_best_of_each_group(ratio, decibels):
    """By brute force over all allocations, group by group, as the paper solves them."""
    posed = table(NOISY)
    limit = 500  # 4 bits
    terms = Terms(decibels=decibels, ratio=ratio)
    found = solve(Problem.from_json(pose.problem(posed, limit, terms=terms)))
    shares = group_budgets(limit, {CONTENT: 600, QUALITY: 400}, ratio)
    value = (lambda x: 10 * math.log10(x)) if decibels else (lambda x: x)
    for group, most in shares.items():
        layers = [layer for layer in posed["layers"] if layer["group"] == group]
        options = [
            (sum(value(posed["weights"][x["name"]][f]) for x, f in zip(layers, formats, strict=True)), formats)
            for formats in itertools.product([f"int{b}" for b in BITS], repeat=len(layers))
            if sum(x["formats"][f]["bytes"] for x, f in zip(layers, formats, strict=True)) <= most
        ]
        assert min(options)[1] == tuple(found.choices[x["name"]].split(" ")[0] for x in layers)


def test_in_decibels_weights_and_activations_are_programs_of_their_own():
    """What one may spend changes nothing of the other."""
    losses = [{4: 1e-2 * (i + 1), 8: 1e-5 / (i + 1)} for i in range(len(NAMES))]
    posed = table(NOISY, losses)

    def chosen(limit: int, activations: float, part: int) -> list[str]:
        problem = pose.problem(posed, limit, activations, terms=Terms(decibels=True))
        return [choice.split(" ")[part] for choice in solve(Problem.from_json(problem)).choices.values()]

    assert chosen(500, 5.0, 0) == chosen(500, 8.0, 0) != chosen(700, 5.0, 0)
    assert chosen(500, 5.0, 1) == chosen(700, 5.0, 1) != chosen(500, 8.0, 1)


def test_sums_of_decibels_are_not_those_of_noise():
    """The largest sum of SQNR has more noise: it pays for decibels where there is hardly any noise left."""
    losses = [
        {2: 0.5, 4: 0.2, 8: 0.1},
        {2: 1e-3, 4: 1e-6, 8: 1e-11},
        {2: 1e-3, 4: 1e-6, 8: 1e-11},
        {2: 0.5, 4: 0.2, 8: 0.1},
    ]

    def noise(decibels: bool) -> float:
        problem = pose.problem(table(losses), 600, terms=Terms(decibels=decibels))
        choices = solve(Problem.from_json(problem)).choices
        return sum(losses[i][int(choices[n].split(" ")[0][3:])] for i, n in enumerate(NAMES))

    assert noise(True) > 1.2 * noise(False)


@pytest.mark.invariant("mixdq-5")
def test_a_larger_budget_is_never_worse_whatever_the_ratio():
    for ratio in (0.6, 1.4):
        found = [
            solve(Problem.from_json(pose.problem(table(NOISY), limit, terms=Terms(ratio=ratio)))).objective
            for limit in range(350, 1100, 50)
        ]
        assert all(after <= before for before, after in itertools.pairwise(found))


@pytest.mark.invariant("mixdq-5")
def test_equal_losses_are_allocated_within_the_budget():
    same = [{2: 0.1, 4: 0.01, 8: 0.001}] * len(NAMES)
    for limit in (260, 500, 777):
        found = solve(Problem.from_json(pose.problem(table(same), limit, terms=Terms(ratio=1.0))))
        assert found.costs["bytes"] <= limit and found.choices.keys() == {*NAMES}


@pytest.mark.invariant("mixdq-8")
def test_losses_never_rise_with_the_bits_of_a_kind():
    losses = {"int2": 3.0, "int3": 5.0, "int2+b": 1.0, "int4": 4.0, "int3+b": 2.0, "fp8": 9.0, "int8": 0.5}
    clean = monotone({"weights": {"a": losses}, "activations": {"x": {"8": 2.0, "4": 1.0, "6": 3.0}}})
    assert clean["weights"]["a"] == losses | {"int3": 3.0, "int4": 3.0, "int3+b": 1.0}
    assert clean["activations"]["x"] == {"8": 1.0, "4": 1.0, "6": 1.0}
    assert list(clean["weights"]["a"]) == list(losses)


@pytest.mark.invariant("mixdq-8")
def test_what_is_not_quantized_has_an_infinite_ratio_which_sums_cut():
    """The SQNR of the identity is +inf; in a sum of decibels it is the ceiling, as of any noise below that."""
    clean = Terms(decibels=True).losses({"weights": {"a": {"int8": 0.0, "int4": 1e-3}}, "activations": {}})
    assert clean["weights"]["a"] == {"int8": -sensitivity_table.CEILING_DB, "int4": pytest.approx(-30)}


@pytest.mark.invariant("mixdq-7")
def test_the_most_sensitive_activations_at_their_narrowest_width():
    posed = table(NOISY, [{4: x, 8: 1.0 - x} for x in (0.1, 0.4, 0.3, 0.2)])
    assert pose.most_sensitive(posed, 0.0) == []
    assert pose.most_sensitive(posed, 0.01) == ["xb"]
    assert pose.most_sensitive(posed, 0.5) == ["xb", "xc"]
    assert pose.most_sensitive(posed, 0.25, spared=["xb"]) == ["xc"]
    posed["layers"][0]["edges"] = ["xa", "xb"]  # a shared weight
    assert pose.most_sensitive(posed, 0.01) == ["xa", "xb"]


@pytest.mark.parametrize(
    ("text", "value"), [("2.5T", 2.5e12), ("2.5e12", 2.5e12), (1e9, 1e9), ("800 G", 8e11), ("3k", 3000.0), (None, None)]
)
def test_bit_operations_are_written_with_units(text, value):
    assert budgets.parse_bops(text) == value


@pytest.mark.parametrize("text", ["2.5 TB", "many", "-1G", "0", "nan", "inf", ""])
def test_what_is_no_number_of_bit_operations(text):
    with pytest.raises(UserError, match=r"write 2\.5e12 or 2\.5T"):
        budgets.parse_bops(text)
