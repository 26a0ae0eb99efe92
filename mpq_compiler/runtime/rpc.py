"""A device over the network: sends an artifact's C program to `mpq_rpc`, runs it there, and takes times.

The protocol stands at the head of `backends/tvm/standalone/mpq_rpc.c`. Nothing here imports torch or TVM.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from mpq_compiler.artifact import bundle
from mpq_compiler.artifact.bundle import Artifact
from mpq_compiler.support.errors import UserError

TOKEN = "MPQ_TOKEN"
"""The environment variable with the secret of client and server."""
PIECE = 1 << 20
TIMES = re.compile(r"calls: median ([\d.]+) ms, least ([\d.]+) ms, most ([\d.]+) ms")
CPU = re.compile(r"^kernels on (.*), (?:CPU|wall) time$", re.MULTILINE)
KERNEL = re.compile(r"^ *([\d.]+) us  (\w+)$", re.MULTILINE)
"""What the program prints (`mpq_run.c`)."""
ROUNDS = 7
"""In which artifacts take turns for a latency table, at the least; each turn is the median of `REPEAT` calls."""
REPEAT = 5


class Device:
    """A connection, as a context. UserError: it cannot be made, or is lost; the device refuses what it is asked for."""

    def __init__(self, address: str, token: str | None = None, timeout: float = 600.0) -> None:
        """address: HOST:PORT; token: by default that of the environment; timeout: seconds without an answer."""
        self.address = address
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"--rpc {address} must be HOST:PORT, as mpq_rpc says when it starts")
        try:
            self.socket = socket.create_connection((host, int(port)), 10)
        except OSError as error:
            raise UserError(f"cannot reach {address}: {error.strerror or error}; start mpq_rpc there") from error
        self.socket.settimeout(timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        secret = os.environ.get(TOKEN, "") if token is None else token
        try:
            self._ask(b"MPQ1" + _text(secret))
        except UserError:
            self.socket.close()
            raise

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection, what still runs there, and what was sent."""
        self.socket.close()

    def put(self, path: Path, name: str = "", progress: Callable[[int], None] | None = None) -> None:
        """Sends a file; it may be executed there."""
        self._send(b"P" + _text(name or path.name) + path.stat().st_size.to_bytes(8, "little"))
        with path.open("rb") as file:
            while piece := file.read(PIECE):
                self._send(piece)
                if progress:
                    progress(len(piece))
        self._ask(b"")

    def get(self, name: str) -> bytes:
        """A file's content."""
        self._ask(b"G" + _text(name))
        return self._take(int.from_bytes(self._take(8), "little"))

    def run(self, program: str, *options: str) -> tuple[int, str]:
        """(exit code, 256 and above that of a signal; what was printed) of a program that was sent."""
        words = (program, *options)
        self._ask(b"R" + len(words).to_bytes(4, "little") + b"".join(map(_text, words)))
        code, size = (int.from_bytes(self._take(4), "little") for _ in range(2))
        return code, self._take(size).decode(errors="replace")

    def _ask(self, request: bytes) -> None:
        self._send(request)
        if self._take(1) != b"\0":
            sentence = self._take(int.from_bytes(self._take(4), "little")).decode(errors="replace")
            raise UserError(f"{self.address}: {sentence}")

    def _send(self, data: bytes) -> None:
        try:
            self.socket.sendall(data)
        except OSError as error:
            raise self._lost(error) from error

    def _take(self, count: int) -> bytes:
        found = bytearray()
        try:
            while len(found) < count:
                piece = self.socket.recv(min(count - len(found), PIECE))
                if not piece:
                    raise ConnectionError("it was closed")
                found += piece
        except OSError as error:
            raise self._lost(error) from error
        return bytes(found)

    def _lost(self, error: OSError) -> UserError:
        return UserError(f"the connection to {self.address} is lost: {error.strerror or error}")


def _text(text: str) -> bytes:
    data = text.encode()
    return len(data).to_bytes(4, "little") + data


def function_for(found: Artifact, batch: int) -> str:
    """The function for the batch. UserError: there is none, or no C program."""
    if bundle.SERVER not in found.manifest["files"]:  # that of --standalone needs more than its weights
        raise UserError(f"{found.path} has no program that runs on a device: compile it with --emit c")
    functions = {f["batch"]: f["name"] for f in reversed(found.manifest["functions"])}
    if batch not in functions:
        known = ", ".join(map(str, sorted(functions)))
        raise UserError(f"{found.path} has no function for a batch of {batch}: take {known}")
    return functions[batch]


def send_plans(device: Device, opened: Sequence[Artifact], progress: Any) -> None:
    """Programs and weights, each with its number before its name."""
    size = sum(each.file(name).stat().st_size for each in opened for name in (bundle.PROGRAM, bundle.WEIGHTS))
    with progress(f"sending to {device.address}", size) if progress else nullcontext(lambda n: None) as advance:
        for number, each in enumerate(opened):
            for name in (bundle.PROGRAM, bundle.WEIGHTS):
                device.put(each.file(name), f"{number}-{name}", advance)


def run_program(device: Device, number: int, opened: Artifact, function: str, threads: int, *options: str) -> str:
    """What the program of a number printed of a few calls. UserError: what it says, or that it cannot be run."""
    weights = f"{number}-{bundle.WEIGHTS}"
    few = ("--weights", weights, "--function", function, "--threads", str(threads), "--repeat", str(REPEAT), *options)
    code, printed = device.run(f"{number}-{bundle.PROGRAM}", *few)
    if code or not TIMES.search(printed):
        target = opened.manifest["target"]["name"]
        unknown = f"it cannot run a program for '{target}' ({code}): compile for the target that it is (--target)"
        raise UserError(f"{device.address}: {printed.strip().removeprefix('error: ') or unknown}")
    return printed
