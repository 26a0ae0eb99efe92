"""Addresses of clusters, and what is said where there is none."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint

import pytest

from mpq_compiler.cli.mpqc import main
from mpq_compiler.ir.parcels import SHIPPING
from mpq_compiler.support import cluster, plugins
from mpq_compiler.support.errors import UserError
from tests.harness.tree import ROOT


@pytest.fixture
def unused() -> Iterator[int]:
    """A port on which nothing listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def test_no_address_is_no_cluster() -> None:
    with cluster.connected(None, SHIPPING, 1) as found:
        assert found is None


@pytest.mark.parametrize("address", ["dask://host:1", "rai", "", "many"])
def test_addresses_of_no_kind_are_refused(address: str) -> None:
    with pytest.raises(UserError, match=rf"distributed='{address}' names no cluster .*ray://HOST:PORT"):
        cluster.kind_of(address)


@pytest.mark.parametrize("address", ["ray://", "ray://host", "host:", "host:port", "ray://host:99999", "a b:1"])
def test_malformed_addresses_are_refused(address: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(UserError, match="is no address"):
        cluster.kind_of(address).require(address)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = EntryPoint("ray", "absent_cluster:kind [ray]", cluster.ENTRY_POINTS)
    monkeypatch.setattr(plugins, "built_in", lambda group: (missing,))
    with pytest.raises(UserError) as error:
        cluster.kind_of("ray")
    assert str(error.value) == (
        "distributed ray needs absent_cluster, which is not installed: pip install 'mpq-compiler[ray]'"
    )


@pytest.mark.parametrize("scheme", ["ray://", ""])
@pytest.mark.parametrize("command", ["compile", "sensitivity", "eval"])
def test_a_command_ends_before_it_reads_a_model_where_nothing_answers(tmp_path, capsys, unused, scheme, command):
    pytest.importorskip("ray")
    output = [] if command == "eval" else ["-o", str(tmp_path / "out")]
    model = str(tmp_path / "model")  # there is none, which would be the next error
    assert main([command, model, *output, "--distributed", f"{scheme}127.0.0.1:{unused}"]) == 1
    announced, said = capsys.readouterr().err.splitlines()
    assert model in announced
    assert said.startswith(f"mpqc: no Ray cluster answers at {scheme}127.0.0.1:{unused} (")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scheme", ["ray://", ""])
def test_what_answers_and_is_no_cluster_is_refused(monkeypatch, scheme) -> None:
    pytest.importorskip("ray")
    from mpq_compiler.support import ray_cluster

    monkeypatch.setattr(ray_cluster, "ANSWER", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections and says nothing
        address = f"{scheme}127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UserError, match=f"what answers at {address} is no Ray cluster"):
            cluster.require(address)


def test_without_the_option_ray_is_not_imported() -> None:
    code = (
        "import sys; import mpq_compiler.api.compile, mpq_compiler.driver.measure, mpq_compiler.cli.mpqc; "
        "assert 'ray' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
