"""Files and folders written whole or not at all: killed at any moment, nothing is lost and nothing stays."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mpq_compiler.support import files
from tests.harness.tree import ROOT

WRITE = """
import sys, time
from pathlib import Path
from mpq_compiler.support import files
place, exchange = Path(sys.argv[1]), sys.argv[2] == "exchange"
if not exchange:
    files._exchanged = lambda one, other: False
print("ready", flush=True)
for number in range(1_000_000):
    files.sweep(place.parent, place.name)
    with files.beside(place) as scratch:
        made = scratch / "made"
        made.mkdir()
        for part in range(4):
            (made / str(part)).write_text(str(number))
        files.put(made, place, scratch)
"""


def whole(place: Path) -> bool:
    return len({(place / str(part)).read_text() for part in range(4)}) == 1


@pytest.mark.parametrize("way", ["exchange", "one after the other"])
@pytest.mark.invariant("trust-2")
def test_no_kill_loses_both_folders(way: str, tmp_path: Path) -> None:
    """Killed thirty times while it replaces a folder, a process leaves one that is whole, and the next one sweeps."""
    place, chance = tmp_path / "out", random.Random(3)
    for kill in range(30):
        command = [sys.executable, "-c", WRITE, str(place), way]
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        time.sleep(0.02 + chance.random() * 0.02)
        child.kill()
        child.wait()
        child.stdout.close()
        files.sweep(tmp_path, "out")
        assert [path.name for path in tmp_path.iterdir()] == ["out"], kill
        assert whole(place)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_until_names_are_right(number: signal.Signals, tmp_path: Path, monkeypatch) -> None:
    """It comes between the two renames: both folders are where they belong when it is heard of."""
    old = signal.signal(number, signal.default_int_handler)
    place = tmp_path / "out"
    place.mkdir()
    rename = os.rename

    def interrupted(one: Path, other: Path) -> None:
        rename(one, other)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(files, "_exchanged", lambda one, other: False)
    monkeypatch.setattr(os, "rename", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt), files.beside(place) as scratch:
            (scratch / "made").mkdir()
            (scratch / "made" / "new").touch()
            files.put(scratch / "made", place, scratch)
    finally:
        signal.signal(number, old)
    assert (place / "new").exists() and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_rename_that_is_refused_puts_the_old_one_back(tmp_path: Path, monkeypatch) -> None:
    place, rename = tmp_path / "out", os.rename
    place.mkdir()
    (place / "old").touch()

    def refused(one: Path, other: Path) -> None:
        if Path(one).name == "made":
            raise OSError("refused")
        rename(one, other)

    monkeypatch.setattr(files, "_exchanged", lambda one, other: False)
    monkeypatch.setattr(os, "rename", refused)
    with pytest.raises(files.UserError), files.beside(place) as scratch:
        (scratch / "made").mkdir()
        files.put(scratch / "made", place, scratch)
    assert (place / "old").exists() and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_lives_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    for name in (".out.notes.partial", ".out.abcdefgh", "out.abcdefgh.partial", ".other.abcdefgh.partial"):
        (tmp_path / name).mkdir()
    before = {path.name for path in tmp_path.iterdir()}
    with files.beside(tmp_path / "out") as scratch:
        files.sweep(tmp_path, "out")
        assert scratch.exists()
        assert {path.name for path in tmp_path.iterdir()} == {*before, scratch.name}
    (tmp_path / ".out.abcdefgh.partial").mkdir()
    files.sweep(tmp_path, "out")
    assert {path.name for path in tmp_path.iterdir()} == before
    files.sweep(tmp_path)
    assert not (tmp_path / ".other.abcdefgh.partial").exists()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / ".out.abcdefgh.partial").symlink_to(tmp_path / "kept")
    files.sweep(tmp_path)
    assert (tmp_path / "kept").is_dir()


def test_writers_and_sweepers_at_once(tmp_path: Path) -> None:
    """What is swept before it is locked is made again: every write succeeds."""
    stop = threading.Event()

    def swept() -> None:
        while not stop.is_set():
            files.sweep(tmp_path)

    sweeper = threading.Thread(target=swept)
    sweeper.start()
    try:
        for number in range(300):
            files.write_whole(tmp_path / "file", lambda stream, n=number: stream.write(str(n).encode()))
            assert (tmp_path / "file").read_text() == str(number)
    finally:
        stop.set()
        sweeper.join()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_permissions_are_those_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    files.write_whole(tmp_path / "file", lambda stream: stream.write(b"x"))
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_lock_goes_with_its_process_alone(tmp_path: Path) -> None:
    """A child that a writer has started does not hold what the writer has left."""
    with files.beside(tmp_path / "out") as scratch:
        child = subprocess.Popen(["sleep", "20"])
        left = tmp_path / ".out.abcdefgh.partial"
        os.rename(scratch, left)
    try:
        handle = os.open(left, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(handle)
    finally:
        child.kill()
        child.wait()
