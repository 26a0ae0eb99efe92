from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch

from mpq_compiler.pipeline import manager, options, registry
from mpq_compiler.pipeline.options import _convert
from mpq_compiler.pipeline.parser import parse, stages, to_text
from mpq_compiler.pipeline.passes import Contract, Pass
from mpq_compiler.pipeline.registry import BUILT_IN as PASSES
from mpq_compiler.pipeline.session import Session
from mpq_compiler.support.errors import UserError
from tests.harness import programs


@pytest.mark.parametrize(
    "text",
    [
        "trace",
        "trace,layout,calibrate{samples=64,steps=10}",
        "sensitivity{formats=int2/int2+b/int8,activations=4/8}",
        "bit-allocation{weights=3.7,uniform=int3+b}",
        "bit-allocation{activations=6.5},round-weights",
        programs.MIXED,
    ],
)
def test_round_trip(text):
    passes = parse(text)
    assert to_text(passes) == text
    assert parse(to_text(passes)) == passes


def test_lowering_stages_follow_an_arrow():
    passes = parse("trace,layout{}")
    text = to_text(passes, ("select-kernels", "fuse-quantizers"))
    assert text == "trace,layout -> select-kernels,fuse-quantizers"
    assert parse(text) == passes and stages(text) == ("select-kernels", "fuse-quantizers")
    assert to_text(passes, ()) == "trace,layout" and stages("trace,layout") == ()


def test_spaces_and_dashes_are_free():
    assert parse(" trace , time-groups { groups = 2 } ") == parse("trace,time-groups{groups=2}")
    assert to_text(parse("time-groups{groups=4,bits=8}")) == "time-groups"  # defaults are left out


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("", "the pipeline is empty; name at least the pass 'trace'"),
        ("trase", "unknown pass 'trase': did you mean 'trace'?"),
        ("trace,,layout", "a pass name is missing"),
        ("calibrate{samples=3", "'{' after 'calibrate' is never closed"),
        ("calibrate{samples}", "'samples' of 'calibrate' must be written option=value"),
        ("calibrate{samples=3}layout", "a comma is missing before 'layout'"),
        ("calibrate{sample=3}", "pass 'calibrate' has no option 'sample': did you mean 'samples'?"),
        ("trace{x=1}", "pass 'trace' has no option 'x': it has none"),
        ("calibrate{samples=many}", "option 'samples' of pass 'calibrate' must be int, not 'many'"),
        ("bit-allocation{weights=low}", "'weights' of pass 'bit-allocation' must be float or none, not 'low'"),
        ("round-weights{method=nearst}", "'method' of pass 'round-weights' is 'nearst': did you mean 'nearest'?"),
        ("sensitivity{activations=8/x}", "option 'activations' of pass 'sensitivity' must be int, not 'x'"),
    ],
)
def test_errors_of_pipelines(text, sentence):
    with pytest.raises(UserError) as caught:
        parse(text)
    assert sentence in str(caught.value)


def test_options_from_python_and_toml():
    made = options.make("sensitivity", {"formats": ["int2", "int8"], "inputs": 4})
    assert made.options() == options.make("sensitivity", {}).options() | {"inputs": 4, "formats": ("int2", "int8")}
    assert options.make("bit-allocation", {"weights": None}).weights is None
    assert _convert("true", bool, "x") is True and _convert("none", float | None, "x") is None
    assert _convert("b", Literal["a", "b"], "x") == "b"
    with pytest.raises(UserError, match="x must be bool, not 'maybe'"):
        _convert("maybe", bool, "x")


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("layout", "pass 'layout' needs 'graph': put trace before it"),
        ("trace,calibrate", "pass 'calibrate' needs 'channels-last': put layout before it"),
        ("trace,layout,calibrate,bit-allocation", "'bit-allocation' needs 'time-groups': put time-groups before it"),
        ("trace,layout,fold-fake-quant", "pass 'fold-fake-quant' needs 'codes': put round-weights before it"),
    ],
)
def test_order_is_checked_before_anything_runs(text, sentence):
    session = Session(None)  # nothing runs: a trace would fail
    with pytest.raises(UserError) as caught:
        manager.run_pipeline(parse(text), programs.empty(), session)
    assert sentence in str(caught.value)


def test_the_default_order_is_complete():
    manager.check([registry.find(name)() for name in PASSES])


def test_every_pass_of_the_registry_is_found_by_its_name():
    for name in PASSES:
        cls = registry.find(name)
        assert cls.name() == name and issubclass(cls, Pass)
        assert (cls.__doc__ or "").strip()


def test_records_and_observers():
    seen = []
    start = programs.after("pixart", "trace")
    program, records = manager.run_pipeline(
        parse("layout"), start, Session(), [lambda *a: seen.append(a)], present={"graph"}
    )
    ((index, step, before, after),) = seen
    assert (index, step.name()) == (0, "layout") and before is start and after is program
    assert [r.name for r in records] == ["layout"] and records[0].seconds > 0 and records[0].peak_bytes > 10**6


def test_passes_leave_their_program_as_it_is():
    from mpq_compiler.ir.printer import text

    for step in programs.steps("pixart"):
        if step.before.inputs:
            before = text(step.before)
            names = {*step.before.tensors}
            step.step.run(step.before, Session(programs.denoiser("pixart"), programs.calibration("pixart")))
            assert text(step.before) == before and names <= {*step.before.tensors}


# --- passes of other packages -------------------------------------------------------------------------------


def distribution(folder: Path, entry: str, source: str = "") -> None:
    """What an installed package leaves on sys.path: its module and the metadata of its entry points."""
    info = folder / "acme_passes-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-passes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{registry.ENTRY_POINTS}]\n{entry}\n")
    if source:
        (folder / "acme_passes.py").write_text(source)


SOURCE = '''
from dataclasses import dataclass
from typing import ClassVar
from mpq_compiler.pipeline.passes import Contract, Pass

@dataclass(frozen=True)
class Polish(Pass):
    """Does nothing, thoroughly."""

    contract: ClassVar[Contract] = Contract.IDENTICAL
    requires: ClassVar[frozenset[str]] = frozenset({"graph"})
    times: int = 1

    @classmethod
    def name(cls):
        return "polish"

    def run(self, program, session):
        return program.fork()
'''


@pytest.fixture
def installed(tmp_path, monkeypatch):
    def install(entry: str, source: str = "") -> None:
        distribution(tmp_path, entry, source)
        monkeypatch.syspath_prepend(tmp_path)

    yield install
    sys.modules.pop("acme_passes", None)


def test_a_pass_of_another_package(installed):
    installed("polish = acme_passes:Polish", SOURCE)
    assert registry.all_names() == [*PASSES, "polish"]
    _, records = manager.run_pipeline(
        parse("layout,polish{times=3}"), programs.after("pixart", "trace"), Session(), present={"graph"}
    )
    assert records[-1].name == "polish"
    assert to_text(parse("polish{times=3}")) == "polish{times=3}"
    with pytest.raises(UserError, match="did you mean 'polish'"):
        parse("polich")


@pytest.mark.parametrize(
    "source, reason",
    [
        ("import no_such_module\n", "fails to import: ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise SystemExit(3)\n", "fails to import: SystemExit: 3"),
        ("Polished = 1\n", "fails to import: AttributeError: .*'Polish'"),
        ("class Polish: pass\n", "is no subclass of mpq_compiler.pipeline.passes.Pass"),
        (SOURCE.replace('"polish"', '"varnish"'), "calls itself 'varnish': name its module after it, or override name"),
        (SOURCE.replace("contract:", "promise:"), "declares no contract: set it to Contract.IDENTICAL, Contract.REW"),
        (SOURCE.replace("def run(", "def walk("), "does not define run"),
    ],
)
def test_a_pass_that_cannot_be_used_is_named_with_the_reason(installed, source, reason):
    installed("polish = acme_passes:Polish", source)
    with pytest.raises(UserError, match=rf"pass 'polish' \(acme_passes:Polish of acme-passes 1.0\) {reason}"):
        parse("polish")
    found, broken = registry.usable()
    assert [*found] == [*PASSES] and [*broken] == ["polish"]
    with pytest.raises(UserError, match="put layout before it"):
        manager.check(parse("trace,calibrate"))


def test_a_name_twice_is_an_error(installed):
    installed("layout = acme_passes:Polish", SOURCE)
    with pytest.raises(UserError, match=r"pass 'layout' is defined more than once \(acme_passes:Polish of acme-passes"):
        parse("layout")


def test_a_pass_is_a_few_lines():
    @dataclass(frozen=True)
    class Negate(Pass):
        contract: ClassVar[Contract] = Contract.IDENTICAL

        def run(self, program, session):
            program = program.fork()
            for node in program.graph.nodes:
                if node.target is torch.ops.aten.silu.default:
                    node.target = torch.ops.aten.sigmoid.default
            return program

    before = programs.after("pixart", "layout")
    after = Negate().run(before, Session())
    assert torch.ops.aten.silu.default in {n.target for n in before.graph.nodes}
    assert torch.ops.aten.silu.default not in {n.target for n in after.graph.nodes}
