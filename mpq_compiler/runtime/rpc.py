"""A client of `mpq_rpc` on a device: sends an artifact's C program, runs it there, and reads its times.

The protocol stands at the head of `backends/tvm/standalone/mpq_rpc.c`. Nothing here imports torch or TVM.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mpq_compiler.artifact import bundle
from mpq_compiler.artifact.bundle import Artifact
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.execution import tracked

TOKEN = "MPQ_TOKEN"
"""The environment variable with the secret that client and server share."""
PIECE = 1 << 20  # bytes that are sent or received at a time
TIMES = re.compile(r"calls: median ([\d.]+) ms, least ([\d.]+) ms, most ([\d.]+) ms")
CPU = re.compile(r"^kernels on (.*), (?:CPU|wall) time$", re.MULTILINE)
KERNEL = re.compile(r"^ *([\d.]+) us  (\w+)$", re.MULTILINE)
"""The lines that the program prints (`mpq_run.c`): `TIMES`, `CPU` and `KERNEL` find their parts."""
ROUNDS = 7
"""The fewest rounds of a latency table on a device; every artifact takes one turn a round."""
REPEAT = 5
"""Calls in a turn, whose median counts."""


class Device:
    """A connection to a device, as a context manager.

    Every method raises a UserError where the connection is lost or the device refuses a request.
    """

    def __init__(self, address: str, token: str | None = None, timeout: float = 600.0) -> None:
        """Connects to a device.

        Args:
            address: HOST:PORT.
            token: the secret, by default the one in the environment variable `TOKEN`.
            timeout: seconds to wait for an answer.

        Raises:
            UserError: there is no secret, the device cannot be reached, or it refuses the secret.
        """
        self.address = address
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"--rpc {address} must be HOST:PORT, as mpq_rpc says when it starts")
        secret = os.environ.get(TOKEN, "") if token is None else token
        if not secret:
            raise UserError(f"{address} needs a token: set {TOKEN} to the one that mpq_rpc was given or printed")
        try:
            self.socket = socket.create_connection((host, int(port)), 10)
        except OSError as error:
            raise UserError(f"cannot reach {address}: {error.strerror or error}; start mpq_rpc there") from error
        self.socket.settimeout(timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
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
        """Closes the connection; the device ends what still runs and removes what was sent."""
        self.socket.close()

    def put(self, path: Path, name: str = "", progress: Callable[[int], None] | None = None) -> None:
        """Sends a file, which becomes executable there.

        Args:
            path: the file.
            name: its name on the device, by default its own.
            progress: is called with the bytes of each piece that was sent.
        """
        self._send(b"P" + _text(name or path.name) + path.stat().st_size.to_bytes(8, "little"))
        with path.open("rb") as file:
            while piece := file.read(PIECE):
                self._send(piece)
                if progress:
                    progress(len(piece))
        self._ask(b"")

    def get(self, name: str) -> bytes:
        """Fetches the content of a file on the device."""
        self._ask(b"G" + _text(name))
        return self._take(int.from_bytes(self._take(8), "little"))

    def run(self, program: str, *options: str) -> tuple[int, str]:
        """Runs a program that was sent; returns its exit code (256 and more for a signal) and what it printed."""
        words = (program, *options)
        self._ask(b"R" + len(words).to_bytes(4, "little") + b"".join(map(_text, words)))
        code, size = (int.from_bytes(self._take(4), "little") for _ in range(2))
        return code, self._take(size).decode(errors="replace")

    def _ask(self, request: bytes) -> None:
        self._send(request)
        self._hear()

    def _hear(self) -> None:
        if self._take(1) != b"\0":
            sentence = self._take(int.from_bytes(self._take(4), "little")).decode(errors="replace")
            raise UserError(f"{self.address}: {sentence}")

    def _send(self, data: bytes) -> None:
        try:
            self.socket.sendall(data)
        except OSError as error:
            if isinstance(error, ConnectionError):
                self._hear()  # why it hung up
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
    """The name of the function for a batch. UserError: there is none, or the artifact has no C program."""
    if bundle.SERVER not in found.manifest["files"]:  # that of --standalone needs more than its weights
        raise UserError(f"{found.path} has no program that runs on a device: compile it with --emit c")
    functions: dict[int, str] = {f["batch"]: f["name"] for f in reversed(found.manifest["functions"])}
    if batch not in functions:
        known = ", ".join(map(str, sorted(functions)))
        raise UserError(f"{found.path} has no function for a batch of {batch}: take {known}")
    return functions[batch]


def send_plans(device: Device, opened: Sequence[Artifact], progress: Any) -> None:
    """Sends the program and weights of each artifact, its index before their names."""
    size = sum(each.file(name).stat().st_size for each in opened for name in (bundle.PROGRAM, bundle.WEIGHTS))
    with tracked(progress, f"sending to {device.address}", size) as advance:
        for number, each in enumerate(opened):
            for name in (bundle.PROGRAM, bundle.WEIGHTS):
                device.put(each.file(name), f"{number}-{name}", advance)


def run_program(device: Device, number: int, opened: Artifact, function: str, threads: int, *options: str) -> str:
    """Runs `REPEAT` calls of an artifact's program on the device and returns what it printed.

    Args:
        device: the connection.
        number: the artifact's index in `send_plans`.
        opened: the artifact.
        function: the function to call.
        threads: threads of a call.
        options: further options of the program.

    Raises:
        UserError: the program fails, with its own sentence, or cannot be run there.
    """
    weights = f"{number}-{bundle.WEIGHTS}"
    few = ("--weights", weights, "--function", function, "--threads", str(threads), "--repeat", str(REPEAT), *options)
    code, printed = device.run(f"{number}-{bundle.PROGRAM}", *few)
    if code or not TIMES.search(printed):
        target = opened.manifest["target"]["name"]
        unknown = f"it cannot run a program for '{target}' ({code}): compile for the target that it is (--target)"
        raise UserError(f"{device.address}: {printed.strip().removeprefix('error: ') or unknown}")
    return printed
