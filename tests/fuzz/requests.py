"""An attack on `mpq_rpc`, compiled with sanitizers: what one who knows the token sends, changed."""

from __future__ import annotations

import os
import random
import socket
import struct
import subprocess
from contextlib import suppress
from pathlib import Path

from mpq_compiler.backends.tvm import standalone
from mpq_compiler.runtime import rpc
from tests.fuzz.attack import REFUSED, RIGHT, TAKEN
from tests.fuzz.programs import SANITIZE, SANITIZED, free_of_limits
from tests.harness.damage import damaged

TOKEN = "a secret of many letters"
SCRIPT = b"#!/bin/true\n" + bytes(200)
"""A program: nothing that is damaged in it does anything."""
QUIET_S, PATIENCE_S = 0.3, 30.0
NAMES = ("script", "none", "", ".", "..", "../x", "/etc/passwd", ".hidden", "-rf", "a b", "x" * 4095, "x" * 4096, "\0")
NUMBERS = (0, 1, 2, 64, 65, 4095, 4096, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)


def source() -> str:
    """The server's."""
    return Path(standalone.__file__).with_name("mpq_rpc.c").read_text()


def device(folder: Path) -> None:
    (folder / "mpq_rpc.c").write_text(source())
    subprocess.run(["gcc", *SANITIZE, str(folder / "mpq_rpc.c"), "-o", str(folder / "mpq_rpc")], check=True)


def requests(base: Path, scratch: Path, chance: random.Random) -> str:
    """Bytes of a connection changed, or names and numbers of its requests."""
    return served(base, scratch, damaged(_sent(), chance) if chance.random() < 0.5 else _sent(chance))


def served(base: Path, scratch: Path, sent: bytes) -> str:
    """How a connection ends. AssertionError: the server does, or does not serve the next one, or leaves something."""
    (scratch / "device").mkdir()
    with subprocess.Popen(
        [str(base / "mpq_rpc"), "--port", "0", "--folder", str(scratch / "device")], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=free_of_limits,
        env=os.environ | SANITIZED | {rpc.TOKEN: TOKEN},
    ) as server:  # fmt: skip
        try:
            assert server.stdout is not None
            host, port = server.stdout.readline().split()[-1].split(":")
            found = _answers((host, int(port)), sent, QUIET_S)
            whole = _answers((host, int(port)), _sent(), PATIENCE_S)
        finally:
            server.terminate()
            _, said = server.communicate(timeout=PATIENCE_S)
    assert server.returncode == 0 and not said, (server.returncode, said[:600])
    assert not [*(scratch / "device").iterdir()], "something is left"
    assert whole == _WHOLE, f"what came after it was not served: {whole!r}"
    if found == _WHOLE:
        return RIGHT
    return REFUSED if _WHOLE.startswith(found) or _ends_with_a_sentence(found) else TAKEN


def _sent(chance: random.Random | None = None) -> bytes:
    """The token, a program, its run, and the program back; where there is chance one or two values are others."""
    values: list[str | int | bytes] = [
        b"MPQ1", TOKEN, b"P", "script", len(SCRIPT), SCRIPT, b"R", 2, "script", "two words", b"G", "script",
    ]  # fmt: skip
    for _ in range(chance.choice([1, 1, 2]) if chance else 0):
        assert chance is not None
        place = chance.randrange(len(values))
        names = [value.encode() for value in NAMES]
        kinds = {str: [*NAMES], int: [*NUMBERS], bytes: [b"P", b"R", b"G", b"", b"X", b"PRG", *names]}
        values[place] = chance.choice(kinds[type(values[place])])
    found = b""
    for place, value in enumerate(values):
        if isinstance(value, int):
            found += struct.pack("<Q" if place == 4 else "<I", value)
        else:
            found += value if isinstance(value, bytes) else rpc._text(value)
    return found


_WHOLE = b"\0" + b"\0" + b"\0" + bytes(8) + b"\0" + struct.pack("<Q", len(SCRIPT)) + SCRIPT
"""The answers to what is not changed: the token, the file, the run with its exit code and what it printed, the file."""


def _answers(address: tuple[str, int], sent: bytes, patience: float) -> bytes:
    """All that the server says, until it hangs up; the client does when it has all answers, or has waited in vain."""
    found = b""
    with socket.create_connection(address, PATIENCE_S) as connection, suppress(ConnectionError):
        connection.sendall(sent)
        connection.settimeout(patience)
        with suppress(TimeoutError):
            while found != _WHOLE:
                if not (piece := connection.recv(1 << 16)):
                    return found
                found += piece
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(PATIENCE_S)
        while piece := connection.recv(1 << 16):
            found += piece
    return found  # ConnectionError: it hung up on what it had not read


def _ends_with_a_sentence(answers: bytes) -> bool:
    for place, byte in enumerate(answers):
        rest = answers[place + 5 :]
        if byte == 1 and rest and answers[place + 1 : place + 5] == struct.pack("<I", len(rest)):
            return rest.decode(errors="replace").isprintable()
    return False
