"""The server for devices and its client: what is sent and run, what is refused, that nothing is left."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from mpq_compiler import schemas
from mpq_compiler.backends.tvm import standalone
from mpq_compiler.backends.tvm.build import build
from mpq_compiler.bench import remote
from mpq_compiler.driver import measure
from mpq_compiler.ir.program import Program
from mpq_compiler.latency.candidates import Latency
from mpq_compiler.latency.remote import measured
from mpq_compiler.pipeline import parser
from mpq_compiler.runtime import rpc
from mpq_compiler.runtime.rpc import Device
from mpq_compiler.support import host
from mpq_compiler.support.errors import UserError
from mpq_compiler.targets import table as targets
from tests.harness import packed, qemu

TOKEN = "a secret"


@functools.cache
def server(compiler: str) -> Path:
    """mpq_rpc, built by a compiler."""
    path = Path(tempfile.mkdtemp(prefix="mpq-rpc-")) / "mpq_rpc"
    source = Path(standalone.__file__).with_name("mpq_rpc.c")
    subprocess.run([compiler, *standalone.OPTIONS, "-Wall", "-Wextra", "-Werror", source, "-o", path], check=True)
    return path


@contextmanager
def listening(folder: Path, token: str = TOKEN, emulated: bool = False, cpu: str = "") -> Iterator[str]:
    """The address of a server; it must end when it is told to, and leave nothing.

    cpu: what programs run on, emulated
    """
    if emulated and (absent := qemu.missing()):
        pytest.skip(absent)
    command = [str(server("aarch64-linux-gnu-gcc" if emulated else "gcc")), "--port", "0", "--folder", folder.name]
    command += ["--with", f"qemu-aarch64 -cpu {cpu}"] if cpu else []
    environment = {**os.environ, "MPQ_TOKEN": token}
    before = ["qemu-aarch64"] if emulated else []
    with subprocess.Popen(
        [*before, *command], stdout=subprocess.PIPE, text=True, env=environment, cwd=folder.parent
    ) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[-1]
        finally:
            process.terminate()
            assert process.wait(20) == 0
    assert not list(folder.iterdir())


def script(folder: Path, text: str) -> Path:
    path = folder / "script"
    path.write_text(f"#!/bin/sh\n{text}\n")
    return path


@pytest.mark.parametrize("emulated", [False, True])
def test_files_and_programs(tmp_path, emulated):
    (tmp_path / "device").mkdir()
    data = os.urandom(3_000_001)
    (tmp_path / "data").write_bytes(data)
    with listening(tmp_path / "device", emulated=emulated) as address, Device(address, TOKEN) as device:
        device.put(tmp_path / "data")
        device.put(script(tmp_path, 'cat data > copy; echo "$1 $MPQ_TOKEN"; echo error >&2; exit 3'))
        assert device.run("script", "two words") == (3, "two words \nerror\n"), "the token is not for programs"
        assert device.get("copy") == data
        device.put(script(tmp_path, "kill -9 $$"))
        assert device.run("script") == (256 + 9, "")


def test_what_is_refused(tmp_path):
    (tmp_path / "device").mkdir()
    with listening(tmp_path / "device") as address:
        with pytest.raises(UserError, match="the token is wrong"):
            Device(address, "another")
        with pytest.raises(UserError, match="the token is wrong"):
            Device(address, "")
        with Device(address, TOKEN) as device:
            for name in ("../out", "/etc/passwd", ".hidden", "-rf", "a b"):
                with pytest.raises(UserError, match="this name cannot be that of a file"):
                    device.put(script(tmp_path, "true"), name)
                with pytest.raises(UserError, match="there is no such file"):
                    device.get(name)
                with pytest.raises(UserError, match="there is no such program"):
                    device.run(name)
        with socket.create_connection(tuple(address.split(":"))) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            with suppress(ConnectionResetError):
                assert stranger.recv(1) == b"", "it hangs up"
        with Device(address, TOKEN):
            pass
    with pytest.raises(UserError, match=r"cannot reach .*start mpq_rpc there"):
        Device(address, TOKEN)
    with pytest.raises(UserError, match="must be HOST:PORT"):
        Device("board")
    done = subprocess.run(
        [server("gcc"), "--host", "0.0.0.0", "--port", "0"], capture_output=True, text=True, env={"MPQ_TOKEN": ""}
    )
    assert done.returncode == 1 and "beyond 127.0.0.1 a token is needed" in done.stderr


def test_a_dropped_connection_leaves_nothing_running(tmp_path):
    (tmp_path / "device").mkdir()
    alive = tmp_path / "alive"
    with listening(tmp_path / "device") as address:
        device = Device(address, TOKEN)
        device.put(script(tmp_path, f"while true; do date +%N > {alive}; sleep 0.05; done"))
        device._send(b"R" + (1).to_bytes(4, "little") + rpc._text("script"))
        deadline = time.monotonic() + 20
        while not alive.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        device.socket.close()
        with Device(address, TOKEN) as other:
            with pytest.raises(UserError, match="there is no such file"):
                other.get("script")
            last = alive.read_text()
            time.sleep(0.5)
            assert alive.read_text() == last


def test_a_program_may_close_its_output(tmp_path):
    """It is waited for, and ended where the client goes."""
    (tmp_path / "device").mkdir()
    with listening(tmp_path / "device") as address:
        with Device(address, TOKEN) as device:
            device.put(script(tmp_path, "echo said; exec >/dev/null 2>&1; sleep 0.3; exit 5"))
            assert device.run("script") == (5, "said\n")
        device = Device(address, TOKEN)
        device.put(script(tmp_path, "exec >/dev/null 2>&1; sleep 60"))
        device._send(b"R" + (1).to_bytes(4, "little") + rpc._text("script"))
        time.sleep(0.5)
        device.socket.close()
        begun = time.monotonic()
        with Device(address, TOKEN):
            assert time.monotonic() - begun < 30


def test_bench_on_a_device(tmp_path, monkeypatch):
    """Two artifacts in turns, through a server on this machine."""
    monkeypatch.setenv(rpc.TOKEN, TOKEN)
    (tmp_path / "device").mkdir()
    target, case = targets.resolve("native"), packed.program("dit", "int8")
    built = build(case.program, target, (1, 2), jobs=2, cache=packed.kernel_cache(), emit="c")
    paths = [packed.write(tmp_path / f"{name}.mpq", case.program, target, built) for name in ("first", "second")]
    with listening(tmp_path / "device") as address:
        found = remote.bench(paths, address, threads=2, batch=2, rounds=3)
        with pytest.raises(UserError, match="has no function for a batch of 3: take 1, 2"):
            remote.bench(paths, address, batch=3)
        with pytest.raises(UserError, match="there is no artifact"):
            remote.bench([tmp_path / "none.mpq"], address)
    assert schemas.check(found, "bench") is None
    assert [row["name"] for row in found["rows"]] == ["mpq", "mpq control", "mpq second"]
    assert all(0 < row["ms_min"] <= row["ms"] <= row["ms_max"] for row in found["rows"])


TARGET = "aarch64-dotprod"


def emulated_latency() -> tuple[Latency, Program]:
    """What answers for times on a device, and the program that it is asked about."""
    made = packed.program("dit", "int8")
    passes = parser.parse(packed.PIPELINE.format("", "int8"))
    target = targets.resolve(TARGET)
    return Latency(target, made.denoiser, passes, cache=packed.kernel_cache(), jobs=2), made.planned


def test_a_latency_table_of_a_device_answers_for_every_kernel(tmp_path, monkeypatch):
    """Server and programs are those of AArch64, under emulation; only what times say cannot be tested there."""
    monkeypatch.setenv(rpc.TOKEN, TOKEN)
    monkeypatch.setattr(rpc, "ROUNDS", 1)
    (tmp_path / "device").mkdir()
    latency, program = emulated_latency()
    with (
        listening(tmp_path / "device", emulated=True, cpu="cortex-a76") as address,
        latency.plans(program, ["int8"], emit="c") as (plan,),
    ):
        table = measured([plan, plan], address, seconds=0)
        other = replace(plan, manifest={**plan.manifest, "target": {"name": "aarch64-neon"}})
        with pytest.raises(UserError, match="one table holds for one target"):
            measured([plan, other], address)
    assert schemas.check(json.loads(json.dumps(table.to_json())), "latency") is None
    assert (table.target, table.cpu, table.threads, table.batch) == (TARGET, host.cpu(), 1, 1)
    assert all(spent > 0 for spent in table.kernels.values())
    costs = replace(latency, table=table).costs(program, ["int8"])
    assert costs.fixed > 0 and all(layer["int8"] > 0 for layer in costs.layers.values())


def test_programs_for_another_device_are_refused(tmp_path, monkeypatch):
    """For a CPU that lacks what the kernels need, and for another architecture."""
    monkeypatch.setenv(rpc.TOKEN, TOKEN)
    (tmp_path / "device").mkdir()
    latency, program = emulated_latency()
    with latency.plans(program, ["int8"], emit="c") as plans:
        with (
            listening(tmp_path / "device", emulated=True, cpu="cortex-a53") as address,
            pytest.raises(UserError, match=f"lacks .*asimddp.* which the kernels for '{TARGET}' need"),
        ):
            measured(plans, address)
        with (
            listening(tmp_path / "device") as address,
            pytest.raises(UserError, match=f"it cannot run a program for '{TARGET}'"),
        ):
            measured(plans, address)


def test_a_device_of_a_model_is_asked_before_anything_is_compiled(tmp_path):
    (tmp_path / "device").mkdir()
    with listening(tmp_path / "device") as address:
        with pytest.raises(UserError, match="the token is wrong"):
            measure.measure_latency(packed.BUNDLED, rpc=address, target=TARGET)
        with pytest.raises(UserError, match="name its target with --target"):
            measure.measure_latency(packed.BUNDLED, rpc=address)
    with pytest.raises(UserError, match="cannot reach"):
        measure.measure_latency(packed.BUNDLED, rpc=address, target=TARGET)
