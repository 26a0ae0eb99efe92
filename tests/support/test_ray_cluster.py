"""Tasks on two machines of a Ray cluster, which are processes of this one; processes and machines die."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mpq_compiler.driver.compile import compile_denoiser
from mpq_compiler.frontend import denoiser as denoisers
from mpq_compiler.ir.parcels import SHIPPING, identity
from mpq_compiler.support.errors import BudgetError, UserError
from tests.harness import tiny

ray = pytest.importorskip("ray")

from mpq_compiler.support import ray_cluster  # noqa: E402 (imports Ray)

MACHINE = {"num_cpus": 1, "object_store_memory": 200_000_000}


class Machines:
    """A cluster of two machines, the first of which keeps what all need."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(True, head_node_args=MACHINE | {"include_dashboard": False})
        self.second = self.cluster.add_node(**MACHINE)

    @property
    def address(self) -> str:
        return self.cluster.address

    def kill(self) -> None:
        """Ends the second machine with all of its processes, as if its power failed."""
        self.cluster.remove_node(self.second, allow_graceful=False)


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    found = Machines()
    yield found
    found.cluster.shutdown()


@contextlib.contextmanager
def connected(address: str) -> Iterator[ray_cluster.RayCluster[torch.Tensor]]:
    ray_cluster.require(address)
    with ray_cluster.connect(address, SHIPPING, 1) as cluster:
        yield cluster


def dot(shared: tuple[torch.Tensor, Path, Path], item: int) -> tuple[torch.Tensor, int]:
    """A product with a large tensor; the first process that comes to the third item is killed in the middle."""
    values, log, killed = shared
    with log.open("a") as file:
        file.write(f"{item}\n")
    if item == 3 and not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return values * item, torch.get_num_threads()


def refuses(_: None, item: int) -> int:
    if item == 2:
        raise BudgetError("a budget of 3 bytes cannot be met")
    time.sleep(0.2)
    return item


def test_a_process_that_is_killed_costs_its_task_alone(machines: Machines, tmp_path: Path, monkeypatch) -> None:
    values, told = torch.rand(300, 300), []
    log, killed = tmp_path / "log", tmp_path / "killed"
    with connected(machines.address) as cluster:
        found = cluster.run(dot, (values, log, killed), iter(range(8)), lambda item, _: told.append(item))
        assert all(torch.equal(product, values * i) for i, (product, _) in enumerate(found))
        assert {threads for _, threads in found} == {1}
        assert sorted(told) == [*range(8)] and killed.exists()
        # what the killed process had been sent besides may not have begun
        assert Counter(map(int, log.read_text().split())) == Counter([*range(8), 3])
        found[0][0].add_(1)  # results are the caller's own
        assert len(cluster._known) == 1  # in the object store once
        with pytest.raises(BudgetError, match="3 bytes"):
            cluster.run(refuses, None, range(100))
        assert cluster.run(refuses, None, []) == []
        monkeypatch.setenv("MPQ_TEST_TORCH", "2.0")  # here alone
        other = ray_cluster.RayCluster(replace(SHIPPING, identity=as_the_environment_says))
        differ = rf"has torch {torch.__version__.split('+')[0]}.*, this one 2\.0, which would give other bits"
        with pytest.raises(UserError, match=differ):
            other.require_alike()
        with pytest.raises(UserError, match=differ):  # of a machine that joined later
            other.run(refuses, None, [1])
    assert not ray.is_initialized()


def as_the_environment_says() -> dict[str, str]:
    return identity() | {"torch": os.environ.get("MPQ_TEST_TORCH", torch.__version__)}


PIPELINE = (
    "trace,layout,calibrate{samples=2,steps=4},time-groups{groups=2},"
    "sensitivity{inputs=4,probes=2,sampled=5000,formats=int2/int2+b/int8},bit-allocation{weights=5.5},insert-fake-quant,residual-branch,"
    "round-weights{method=gptq},fold-fake-quant,fuse-epilogues"
)


def artifact(folder: Path, address: str | None, advanced: Callable[[str, int], None] = lambda title, done: None):
    """The files of an artifact. ``advanced`` hears of the progress."""

    @contextlib.contextmanager
    def progress(title: str, total: int) -> Iterator[Callable[..., None]]:
        done = 0

        def advance(count: int, said: str = "") -> None:
            nonlocal done
            done += count
            advanced(title, done)

        yield advance
        assert done == total, f"{title}: {done} of {total}"

    folder.mkdir()
    model = denoisers.wrap(tiny.model("dit"), name="dit")
    compile_denoiser(
        *(model, folder / "out", progress), target="reference", pipeline=PIPELINE, distributed=address,
        cache=folder / "cache",
    )  # fmt: skip
    files = sorted(path for path in (folder / "out").rglob("*") if path.is_file())
    return {path.name: path.read_bytes() for path in files}


def test_an_artifact_has_the_same_bytes_though_a_machine_dies(machines: Machines, tmp_path: Path) -> None:
    """It dies among the sensitivities; the other one measures the rest, and rounds."""
    killed: list[str] = []

    def advanced(title: str, done: int) -> None:
        if title == "measuring losses" and done > 10 and not killed:
            machines.kill()
            killed.append(title)

    expected = artifact(tmp_path / "alone", None)
    found = artifact(tmp_path / "many", machines.address, advanced)
    assert killed
    assert found.keys() == expected.keys() and len(found) > 2
    assert found == expected
