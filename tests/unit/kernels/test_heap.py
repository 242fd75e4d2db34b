"""Tensors in the extension's heap: no two overlap, no hole is left that could be used, PyTorch is none the wiser."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.kernels import extension, heap

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(bool(extension.MISSING), reason=f"no extension: {extension.MISSING}"),
]

MB = 2**20
ROOM = 2**40


if not extension.MISSING:
    from veneer.kernels import _cpu


PAGE = 4096


class _Heap:
    """With what it gave back, in order."""

    def __init__(self, room=ROOM):
        self.given = given = list[tuple[int, int]]()
        self._heap = _cpu.Heap(room, PAGE, lambda start, size: given.append((start, size)))
        self.take, self.let_go = self._heap.take, self._heap.let_go

    @property
    def held(self):
        return self._heap.held


def _lines(size):
    return max(64, -(-size // 64) * 64)


def _pages(start, size):
    return set(range(start // PAGE, -(-(start + size) // PAGE)))


@given(st.lists(st.tuples(st.integers(0, 40 * MB), st.integers(0, 5)), max_size=60))
def test_blocks_begin_where_pytorch_asks_for_and_do_not_overlap(steps):
    here = _Heap()
    live: dict[int, tuple[int, int]] = {}
    for number, (size, gone) in enumerate(steps):
        start = here.take(size)
        live[number] = start, _lines(size)
        assert start % 64 == 0
        if gone in live:
            here.let_go(live.pop(gone)[0])
        pieces = sorted(live.values())
        assert all(begin + length <= after for (begin, length), (after, _) in pairwise(pieces))
    for start, _ in live.values():
        here.let_go(start)
    assert here.take(ROOM) == 0, "what was let go is one piece again"


@given(st.lists(st.tuples(st.integers(1, 6000), st.integers(0, 9)), max_size=80))
def test_it_holds_the_pages_that_it_says_and_gives_none_of_a_block_back(steps):
    here = _Heap()
    live: dict[int, tuple[int, int]] = {}
    held: set[int] = set()
    most = 0
    for number, (kilobytes, gone) in enumerate(steps):
        if number - gone in live:
            here.let_go(live.pop(number - gone)[0])
        size = kilobytes * 1000
        live[number] = here.take(size), _lines(size)
        held |= _pages(*live[number])
        for start, bytes_back in here.given:
            assert start % PAGE == bytes_back % PAGE == 0
            back = _pages(start, bytes_back)
            assert back <= held
            assert not any(back & _pages(*block) for block in live.values())
            held -= back
        here.given.clear()
        assert here.held == PAGE * len(held)
        most = max(most, sum(size for _, size in live.values()))
        small_holes = (len(live) + 1) * MB  # those below a megabyte keep what they have
        assert here.held <= most + MB + small_holes


def test_a_hole_takes_a_block_of_its_own_size_and_the_smallest_hole_is_taken():
    here = _Heap()
    starts = [here.take(size) for size in (4 * MB, 64, 2 * MB, 64, 4 * MB, 64)]
    held = here.held
    for start in starts[::2]:
        here.let_go(start)
    assert [here.take(size) for size in (2 * MB, 4 * MB, 4 * MB)] == [starts[2], starts[0], starts[4]]
    assert here.held == held
    assert not here.given


def test_holes_side_by_side_are_one():
    here = _Heap()
    starts = [here.take(MB) for _ in range(4)]
    for number in (0, 2, 1):
        here.let_go(starts[number])
    assert here.take(3 * MB) == 0


def test_what_lies_in_holes_is_given_back_before_the_heap_takes_more_than_its_blocks_ever_did():
    here = _Heap()
    low, _, high = here.take(10 * MB), here.take(MB), here.take(4 * MB)
    here.let_go(low)
    here.let_go(high)
    here.take(12 * MB)  # fits into neither, and lies where the last one was, and behind it
    assert here.given == [(2 * MB, 8 * MB)], "the last pages of the hole, and no more than was taken"
    assert here.held == 15 * MB, "what the first three took"
    here.take(10 * MB)
    assert here.held == 23 * MB, "all of it is blocks"


def test_a_little_more_is_taken_without_a_call_of_the_system():
    here = _Heap()
    low, _ = here.take(10 * MB), here.take(MB)
    here.let_go(low)
    here.take(10 * MB + MB // 2)
    assert here.given == [(0, 10 * MB)]
    here.let_go(here.take(MB // 4))
    here.take(MB // 4)
    assert len(here.given) == 1


def test_a_large_hole_is_given_back_and_asked_for_again():
    here = _Heap()
    small, large = here.take(100 * MB), here.take(1000 * MB)
    here.let_go(small)
    assert not here.given, "not worth it"
    here.let_go(large)
    assert here.given == [(0, 1100 * MB)]
    assert here.held == 0
    here.take(MB)
    assert here.held == MB


def test_only_a_block_can_be_let_go():
    here = _Heap()
    start = here.take(MB)
    with pytest.raises(ValueError, match="no block"):
        here.let_go(start + 64)
    here.let_go(start)
    with pytest.raises(ValueError, match="no block"):
        here.let_go(start)


def test_where_there_is_no_room_it_says_so():
    here = _Heap(MB)
    assert here.take(MB) == 0
    assert here.take(1) == 2**64 - 1


_IN_A_PROCESS = """
import os, threading, torch
from veneer.kernels.heap import installed, use_heap
before = torch.full((2**20,), 3.0)
assert not installed()
reason = use_heap()
assert reason == "" == use_heap(), reason
assert installed()
one, two = torch.ones(2**20), torch.ones(2**20)
assert two.data_ptr() - one.data_ptr() == one.nbytes, "with nothing between them"
small = [torch.ones(8) for _ in range(100)]
assert float(before.sum() + one.sum()) == 4 * 2**20
place = one.data_ptr()
del before, one
assert torch.empty(2**20).data_ptr() == place
array = torch.arange(4096).numpy()  # numpy lets its tensor go
assert array.sum() == 4095 * 2048
del array

def work(number):
    for turn in range(200):
        made = [torch.full((1024 * (1 + (number + turn + k) % 7),), float(number)) for k in range(5)]
        assert all(bool((tensor == number).all()) for tensor in made)

threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()

child = os.fork()
if child == 0:  # few enough numbers for one thread: OpenMP's threads do not live on in it
    os._exit(0 if float(torch.ones(2**14).sum()) == 2**14 else 1)
assert os.waitpid(child, 0)[1] == 0

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) * 1024
large = torch.ones(2**28 + 2**20)
full = resident()
del large
assert full - resident() > 2**29, "it went back to the system"
print("done")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="made for Linux")
def test_pytorch_allocates_there_in_any_thread_and_after_a_fork():
    environment = {name: value for name, value in os.environ.items() if name != "VENEER_HEAP"}
    done = subprocess.run(
        [sys.executable, "-c", _IN_A_PROCESS], capture_output=True, text=True, check=False, env=environment
    )
    if "another allocator" in done.stderr:
        pytest.skip("another allocator stands before the C library's")
    assert done.stdout == "done\n", done.stderr


def test_who_does_not_want_it_does_not_get_it(monkeypatch):
    monkeypatch.setenv("VENEER_HEAP", "0")
    assert heap.use_heap() == "VENEER_HEAP is 0"


def test_without_the_extension_it_says_so(monkeypatch):
    monkeypatch.setattr(heap, "MISSING", "they were not built")
    assert heap.use_heap() == "the C++ kernels are missing: they were not built"


_PRELOADED = """
#include <stdlib.h>
int posix_memalign(void** out, size_t alignment, size_t size) {
    *out = aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
    return *out ? 0 : 12;
}
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="made for Linux")
@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer must come first")
def test_an_allocator_of_the_users_own_stays(tmp_path):
    (tmp_path / "other.c").write_text(_PRELOADED)
    built = subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", tmp_path / "other.so", tmp_path / "other.c"], capture_output=True, check=False
    )
    if built.returncode:
        pytest.skip("no C compiler")
    asked = "import torch; from veneer.kernels.heap import use_heap; print(use_heap()); torch.ones(10**6)"
    done = subprocess.run(
        [sys.executable, "-c", asked], capture_output=True, text=True, check=True,
        env={"PATH": "/usr/bin:/bin", "LD_PRELOAD": str(tmp_path / "other.so")},
    )  # fmt: skip
    assert done.stdout == "another allocator stands before the C library's\n"


def test_in_a_process_that_is_not_veneers_own_nothing_is_replaced(monkeypatch):
    monkeypatch.setattr(heap, "settled", lambda: False)
    monkeypatch.setattr(heap, "use_heap", lambda: pytest.fail("it was asked for"))
    assert not heap.own_heap()
    monkeypatch.setattr(heap, "settled", lambda: True)
    for reason, used in (("", True), ("another allocator", False)):
        monkeypatch.setattr(heap, "use_heap", lambda reason=reason: reason)
        assert heap.own_heap() is used


def test_asking_whether_it_is_installed_installs_nothing(monkeypatch):
    monkeypatch.setattr(heap, "settled", lambda: True)
    monkeypatch.setattr(heap, "use_heap", lambda: pytest.fail("it was installed"))
    monkeypatch.setattr(heap, "_installed", False)
    assert not heap.installed()
