"""Memory and time by the operating system."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time

from mpq_compiler.support.usage import PeakMemory, cpu_seconds, memory, memory_once

SIZE = 64 << 20


def test_peaks_are_seen_and_forgotten_once_taken():
    with PeakMemory() as peak:
        before = memory()
        with mmap.mmap(-1, SIZE) as held:  # not of the heap, where earlier tests can have left as much
            held[:: mmap.PAGESIZE] = b"x" * (SIZE // mmap.PAGESIZE)
            time.sleep(0.2)
        assert peak.take() >= before + SIZE
        assert peak.take() < before + SIZE // 2


def test_pages_of_mapped_files_do_not_count(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * SIZE)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        before = memory()
        assert sum(mapped[i] for i in range(0, SIZE, mmap.PAGESIZE)) > 0
        assert memory() < before + SIZE // 2


def _holding(ready, done) -> None:
    held = bytearray(b"x") * SIZE
    ready.set()
    done.wait(30)
    del held


def test_children_count():
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    before = memory()
    child = context.Process(target=_holding, args=(ready, done))
    child.start()
    assert ready.wait(30)
    assert memory() > before + SIZE
    done.set()
    child.join()


def test_what_a_fork_shares_counts_once():
    code = f"""
import os, time
held = bytearray(b"x") * {SIZE}
child = os.fork()
os.write(1, b"ready\\n")
time.sleep(30)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == process.stdout.readline() == b"ready\n"
        assert memory(process.pid) > 2 * SIZE
        assert SIZE < memory_once(process.pid) < 1.5 * SIZE
        os.killpg(process.pid, signal.SIGKILL)


def test_freed_memory_goes_back():
    code = """
from mpq_compiler.support.usage import memory, return_freed_memory
import sys
if sys.argv[1] == "back":
    return_freed_memory()
bytes(30 << 20)  # one such block that is freed raises glibc's own bound
before = memory()
blocks = [b"x" * (8 << 20) for _ in range(8)]
kept, blocks = blocks[-1], None
print((memory() - before) >> 20)
"""
    left = {
        how: int(subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True).stdout)
        for how in ("back", "kept")
    }
    assert 7 <= left["back"] <= 12
    if platform.libc_ver()[0] == "glibc":
        assert left["kept"] > 30


def test_small_blocks_go_back_where_it_is_asked_for():
    code = """
from mpq_compiler.support.usage import memory, trim
blocks = [bytearray(b"x" * 100_000) for _ in range(640)]
blocks = blocks[::64] + blocks[-1:]  # the last one keeps those before it from going by themselves
before = memory()
trim()
print((before - memory()) >> 20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    if platform.libc_ver()[0] == "glibc":
        assert int(done.stdout) > 40


def test_cpu_seconds_are_those_of_work():
    begin = cpu_seconds()
    time.sleep(0.1)
    assert cpu_seconds() - begin < 0.09
    sum(i * i for i in range(2_000_000))
    assert cpu_seconds() - begin > 0.02


def test_a_block_of_frames_is_shared_by_calls():
    """Calls at a border of CPython's blocks of frames map memory each time, and with room never."""
    code = """
import resource, sys
from mpq_compiler.support.usage import with_room
def leaf(a=0, b=0, c=0, d=0):
    return a
def down(depth):
    if depth:
        return down(depth - 1)
    for _ in range(300):
        leaf()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def sweep():
    begin = faults()
    for depth in range(300):
        down(depth)
    return faults() - begin
call = with_room(sweep) if sys.argv[1] == "room" else sweep
call()
print(call())
"""
    taken = {
        how: int(subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True).stdout)
        for how in ("room", "bare")
    }
    assert taken["room"] < 200
    if platform.python_implementation() == "CPython":
        assert taken["bare"] > 1000
