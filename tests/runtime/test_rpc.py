"""The server for devices and its client: what is sent and run, what is refused, that nothing is left."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
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

TOKEN = "a secret of many letters"


@functools.cache
def server(compiler: str) -> Path:
    """mpq_rpc, built by a compiler."""
    path = Path(tempfile.mkdtemp(prefix="mpq-rpc-")) / "mpq_rpc"
    source = Path(standalone.__file__).with_name("mpq_rpc.c")
    subprocess.run([compiler, *standalone.OPTIONS, "-Wall", "-Wextra", "-Werror", source, "-o", path], check=True)
    path.parent.chmod(0o755)
    return path


@contextmanager
def listening(folder: Path, token: str = TOKEN, emulated: bool = False, cpu: str = "") -> Iterator[str]:
    """The address of a server; it must end when it is told to, and leave nothing.

    cpu: what programs run on, emulated
    """
    with started(folder, token, emulated, cpu) as process:
        try:
            yield address_of(process)
        finally:
            process.terminate()
            assert process.wait(20) == 0
    assert not list(folder.iterdir())


@contextmanager
def started(
    folder: Path, token: str | None = TOKEN, emulated: bool = False, cpu: str = "", user: int | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A server that makes its folders in ``folder``; without a token in its environment for None."""
    if emulated and (absent := qemu.missing()):
        pytest.skip(absent)
    command = [str(server("aarch64-linux-gnu-gcc" if emulated else "gcc")), "--port", "0", "--folder", folder.name]
    command += ["--with", f"qemu-aarch64 -cpu {cpu}"] if cpu else []
    environment = {name: value for name, value in os.environ.items() if name != rpc.TOKEN}
    environment |= {} if token is None else {rpc.TOKEN: token}
    before = ["qemu-aarch64"] if emulated else []
    with subprocess.Popen(
        [*before, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        cwd=folder.parent, user=user,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def address_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().split()[-1]


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
        with pytest.raises(UserError, match=f"{address} needs a token: set MPQ_TOKEN"):
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


@pytest.mark.parametrize("token", ["", "x", "fifteen letters"])
def test_a_short_token_is_refused(tmp_path, token):
    with started(tmp_path, token) as process:
        assert process.wait(20) == 1
        assert process.stderr is not None
        assert f"error: MPQ_TOKEN has {len(token)} characters: give it 16 to 4095" in process.stderr.read()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--port", "many"], "--port many must be a number up to 65535"),
        (["--port", "65536"], "--port 65536 must be a number up to 65535"),
        (["--host", "board"], "--host board must be an IPv4 address of this machine"),
        (["--folder", "/none"], "cannot make a folder in /none"),
    ],
)
def test_options_that_are_refused(options, sentence):
    done = subprocess.run([server("gcc"), *options], capture_output=True, text=True, env={rpc.TOKEN: TOKEN})
    assert done.returncode == 1 and f"error: {sentence}" in done.stderr


def test_a_server_without_a_token_makes_one(tmp_path, monkeypatch):
    """Another at each start; nobody who does not know it gets in, on this machine either."""
    monkeypatch.delenv(rpc.TOKEN, raising=False)
    tokens = []
    for _ in range(2):
        with started(tmp_path, token=None) as process:
            address = address_of(process)
            assert process.stdout is not None
            name, _, token = process.stdout.readline().strip().partition("=")
            assert name == rpc.TOKEN and len(token) == 32
            tokens.append(token)
            with pytest.raises(UserError, match="needs a token: set MPQ_TOKEN"):
                Device(address)
            with pytest.raises(UserError, match="the token is wrong: set MPQ_TOKEN"):
                Device(address, "0" * 32)
            with socket.create_connection(tuple(address.split(":"))) as stranger:
                stranger.sendall(b"MPQ1" + rpc._text(""))
                assert stranger.recv(1) == b"\1"
            monkeypatch.setenv(rpc.TOKEN, token)
            with Device(address):
                pass
            monkeypatch.delenv(rpc.TOKEN)
            process.terminate()
            assert process.wait(20) == 0
    assert tokens[0] != tokens[1]


def asked(address: str, request: bytes) -> str:
    """The sentence that a request is refused with."""
    device = Device(address, TOKEN)
    with device, pytest.raises(UserError) as error:
        device._ask(request)
    return str(error.value)


def test_what_a_client_claims_is_bounded(tmp_path):
    def number(value: int, size: int = 4) -> bytes:
        return value.to_bytes(size, "little")

    (tmp_path / "device").mkdir()
    with listening(tmp_path / "device") as address:
        for request in (b"P", b"G", b"R" + number(1)):
            assert "of 4294967295 bytes is too long: it may have 4095" in asked(address, request + number(2**32 - 1))
        for count in (0, 65, 2**32 - 1):
            assert f"{count} words are no command: 1 to 64 are" in asked(address, b"R" + number(count))
        large = b"P" + rpc._text("data") + number(2**63, 8) + bytes(1000)
        assert f"has no room for a file of {2**63} bytes" in asked(address, large)
        huge = tmp_path / "huge"
        with huge.open("wb") as file:
            file.truncate(1 << 42)
        with Device(address, TOKEN) as device, pytest.raises(UserError, match=f"no room for a file of {1 << 42} bytes"):
            device.put(huge)
        with Device(address, TOKEN) as device, pytest.raises(UserError, match="a connection may send 1024 files"):
            for _ in range(1025):
                device.put(script(tmp_path, "true"))
        with pytest.raises(UserError, match="token of 5000 bytes is too long"):
            Device(address, "x" * 5000)


def test_who_says_nothing_makes_room(tmp_path):
    (tmp_path / "device").mkdir()
    with listening(tmp_path / "device") as address, socket.create_connection(tuple(address.split(":"))) as silent:
        silent.sendall(b"MPQ1")
        begun = time.monotonic()
        with Device(address, TOKEN):
            assert 5 < time.monotonic() - begun < 20


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


DAEMON = """\
setsid sh -c 'echo $$ > {0}.part; mv {0}.part {0}; exec sleep 600' </dev/null >/dev/null 2>&1 &
while [ ! -e {0} ]; do sleep 0.02; done
"""
"""A script that starts a process in a session of its own, which writes its number to a file."""
LITTER = """\
mkdir -p sub/deep .hidden/.more closed && touch sub/deep/file .dot .hidden/.more/file closed/file
ln -s {0} sub/link && ln -s {0} link && chmod 0 closed
"""
"""A script that leaves files, folders, and links to a folder that is none of its own."""


def runs(pid: int) -> bool:
    """Whether a process is there and no corpse."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def waited(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ended(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while runs(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not runs(pid)


def emptied(folder: Path) -> bool:
    deadline = time.monotonic() + 20
    while list(folder.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not list(folder.iterdir())


@contextmanager
def busy(folder: Path, process: subprocess.Popen[str], lines: str = "sleep 600") -> Iterator[tuple[Device, list[int]]]:
    """A connection whose program runs and has left a daemon and litter; the numbers of both processes."""
    (folder / "kept").mkdir()
    (folder / "kept" / "file").touch()
    text = DAEMON.format(folder / "daemon") + LITTER.format(folder / "kept") + f"echo $$ > {folder / 'main'}.part\n"
    with Device(address_of(process), TOKEN) as device:
        device.put(script(folder, f"{text}mv {folder / 'main'}.part {folder / 'main'}\n{lines}"))
        device._send(b"R" + (1).to_bytes(4, "little") + rpc._text("script"))
        waited(folder / "main")
        numbers = [int((folder / name).read_text()) for name in ("daemon", "main")]
        assert all(map(runs, numbers))
        yield device, numbers
        assert all(map(ended, numbers))
        assert emptied(folder / "device")
        assert (folder / "kept" / "file").exists(), "no link is followed"


@pytest.mark.parametrize("emulated", [False, True])
def test_what_a_program_leaves_ends_with_it(tmp_path, emulated):
    """A daemon in a session of its own, one that holds the output, and one that starts itself again and again."""
    (tmp_path / "device").mkdir()
    again = f"echo . >> {tmp_path / 'count'}\nsetsid ./again </dev/null >/dev/null 2>&1 &"
    with listening(tmp_path / "device", emulated=emulated) as address, Device(address, TOKEN) as device:
        device.put(script(tmp_path, DAEMON.format(tmp_path / "daemon") + "sleep 600 &\necho said"))
        assert device.run("script") == (0, "said\n")
        assert not runs(int((tmp_path / "daemon").read_text()))
        device.put(script(tmp_path, again), "again")
        assert device.run("again") == (0, "")
        count = (tmp_path / "count").read_text()
        time.sleep(0.3)
        assert (tmp_path / "count").read_text() == count


@pytest.mark.parametrize("emulated", [False, True])
@pytest.mark.parametrize("end", ["SIGTERM", "SIGINT", "SIGHUP", "SIGKILL"])
def test_the_end_of_the_server_ends_all(tmp_path, emulated, end):
    (tmp_path / "device").mkdir()
    with started(tmp_path / "device", emulated=emulated) as process, busy(tmp_path, process):
        process.send_signal(getattr(signal, end))
        assert process.wait(20) == (-signal.SIGKILL if end == "SIGKILL" else 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root starts a server of another user")
@pytest.mark.parametrize("end", ["SIGTERM", "SIGKILL"])
def test_the_server_of_a_user_who_makes_no_control_groups(end):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "device").mkdir()
        for each in (folder, folder / "device"):
            each.chmod(0o777)
        with started(folder / "device", user=65534) as process, busy(folder, process):
            process.send_signal(getattr(signal, end))
            assert process.wait(20) == (-signal.SIGKILL if end == "SIGKILL" else 0)


def test_the_end_of_the_client_ends_all(tmp_path):
    (tmp_path / "device").mkdir()
    with started(tmp_path / "device") as process:
        with busy(tmp_path, process) as (device, _):
            device.socket.close()
        process.terminate()


def test_a_program_that_kills_who_serves_it_ends_nobody_else(tmp_path):
    """The server clears up in its place and serves the next."""
    (tmp_path / "device").mkdir()
    with started(tmp_path / "device") as process:
        kills = f"until [ -e {tmp_path}/now ]; do sleep 0.02; done; kill -9 $PPID; sleep 600"
        with busy(tmp_path, process, kills) as (device, _):
            (tmp_path / "now").touch()
        with Device(device.address, TOKEN) as other:
            other.put(script(tmp_path, "exit 7"))
            assert other.run("script") == (7, "")
        process.terminate()
        assert process.wait(20) == 0


def test_leftovers_are_removed_at_the_next_start(tmp_path):
    """Of servers that were killed with all their processes; what another server still uses stays, as does all else."""
    folder = tmp_path / "device"
    (folder / "mpq-rpc-abcdef" / "deep").mkdir(parents=True)
    (folder / "mpq-rpc-abcdef" / ".dot").touch()
    others = [folder / "mpq-rpc-abc", folder / "mpq-rpc-abcdefg", folder / "mpq-abcdef"]
    for each in others:
        each.mkdir()
    (folder / "mpq-rpc-linked").symlink_to(others[0])
    with started(folder) as process, Device(address_of(process), TOKEN) as device:
        assert not (folder / "mpq-rpc-abcdef").exists()
        device.put(script(tmp_path, "exit 3"))
        with started(folder) as second:
            address_of(second)
            assert device.run("script") == (3, "")
            second.terminate()
            assert second.wait(20) == 0
        process.terminate()
        assert process.wait(20) == 0
    assert sorted(folder.iterdir()) == sorted([*others, folder / "mpq-rpc-linked"])


def test_no_depth_of_folders_is_too_much(tmp_path):
    (tmp_path / "device").mkdir()
    with listening(tmp_path / "device") as address, Device(address, TOKEN) as device:
        deeper = "[(os.mkdir('0'), os.chdir('0')) for _ in range(3000)]"
        command = f"{sys.executable} -c \"import os; {deeper}\""
        device.put(script(tmp_path, f"mkdir 1 2; touch 1/file; cd 2; {command}"))
        assert device.run("script")[0] == 0


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


def test_a_device_of_a_model_is_asked_before_anything_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv(rpc.TOKEN, "another that is wrong")
    (tmp_path / "device").mkdir()
    with listening(tmp_path / "device") as address:
        with pytest.raises(UserError, match="the token is wrong"):
            measure.measure_latency(packed.BUNDLED, rpc=address, target=TARGET)
        with pytest.raises(UserError, match="name its target with target"):
            measure.measure_latency(packed.BUNDLED, rpc=address)
    with pytest.raises(UserError, match="cannot reach"):
        measure.measure_latency(packed.BUNDLED, rpc=address, target=TARGET)
