"""Entry points of the package and of others."""

from __future__ import annotations

import configparser
from importlib.metadata import EntryPoint

import pytest

from mpq_compiler.support import plugins
from tests.harness.tree import ROOT


@pytest.mark.parametrize("group", ["mpq_compiler.backends", "mpq_compiler.executors", "mpq_compiler.clusters"])
def test_extras_of_built_in_plugins_are_declared(group: str) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    asked = {extra for entry in plugins.built_in(group) for extra in entry.extras}
    assert asked and asked <= {*setup["options.extras_require"]}


def test_what_pip_installs() -> None:
    assert plugins.requirement(EntryPoint("a", "acme:load [gpu]", "g")) == "mpq-compiler[gpu]"
    (tool, *_) = (entry for entry in plugins.of("console_scripts") if entry.dist and entry.dist.name == "pytest")
    assert plugins.requirement(tool) == "pytest"
