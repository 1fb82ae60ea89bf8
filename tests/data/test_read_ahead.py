import gc
import subprocess
import sys
import threading
import time

import pytest

from e2mc_hf.data.read_ahead import ReadAhead


def readers():
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


@pytest.fixture(autouse=True)
def no_reader_is_left():
    yield
    assert readers() == []


class Numbers:
    """Numbers from 0 on, and how many were asked for."""

    def __init__(self, error_at=None):
        self.asked = 0
        self.closed = threading.Event()
        self.error_at = error_at

    def read(self):
        try:
            while True:
                if self.asked == self.error_at:
                    raise KeyError(f"at {self.asked}")
                self.asked += 1
                yield self.asked - 1
        finally:
            self.closed.set()


def wait_until(fact):
    end = time.monotonic() + 10
    while not fact():
        assert time.monotonic() < end, "waited for 10 seconds"
        time.sleep(0.001)


def test_blocks_come_in_order_with_the_sizes_asked_for():
    numbers = Numbers()
    with ReadAhead(numbers.read(), [3, 1, 0, 2]) as blocks:
        assert list(blocks) == [[0, 1, 2], [3], [], [4, 5]]
        assert list(blocks) == []
    assert numbers.closed.is_set()


def test_one_block_is_read_ahead_and_no_more():
    numbers = Numbers()
    with ReadAhead(numbers.read(), [10] * 5) as blocks:
        wait_until(lambda: numbers.asked == 10)
        next(blocks)
        wait_until(lambda: numbers.asked == 20)
        time.sleep(0.05)
        assert numbers.asked == 20


def test_an_error_is_raised_where_its_block_is_taken_and_ends_the_blocks():
    numbers = Numbers(error_at=5)
    blocks = ReadAhead(numbers.read(), [3, 3, 3])
    assert next(blocks) == [0, 1, 2]
    with pytest.raises(KeyError, match="at 5"):
        next(blocks)
    assert list(blocks) == []
    blocks.close()


def test_closing_ends_the_thread_and_closes_what_it_reads():
    numbers = Numbers()
    blocks = ReadAhead(numbers.read(), [10] * 5)
    next(blocks)
    blocks.close()
    assert readers() == []
    assert numbers.closed.is_set()
    assert list(blocks) == []
    blocks.close()


def test_closing_in_the_midst_of_a_block_does_not_read_it_to_its_end():
    numbers = Numbers()
    with ReadAhead(numbers.read(), [10**12]):
        wait_until(lambda: numbers.asked > 10)
    assert numbers.closed.is_set()


def test_a_consumer_that_fails_leaves_no_thread():
    def fail():
        with ReadAhead(Numbers().read(), [10] * 5) as blocks:
            next(blocks)
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fail()
    assert readers() == []


def test_collecting_the_consumer_ends_the_thread():
    numbers = Numbers()
    blocks = ReadAhead(numbers.read(), [10] * 5)
    cycle = [blocks]
    cycle.append(cycle)
    del blocks, cycle
    gc.collect()
    assert readers() == []
    assert numbers.closed.is_set()


def test_a_reader_that_hangs_is_left_behind():
    release = threading.Event()

    def hanging():
        release.wait()
        yield 0

    blocks = ReadAhead(hanging(), [1])
    start = time.monotonic()
    blocks.close()
    assert time.monotonic() - start < 5
    release.set()
    wait_until(lambda: readers() == [])


def test_waiting_takes_no_computing_time():
    with ReadAhead(Numbers().read(), [10] * 5) as blocks:
        next(blocks)
        start = time.process_time()
        time.sleep(0.2)
        assert time.process_time() - start < 0.1


@pytest.mark.parametrize("state", ["reading", "idle"])
def test_the_interpreter_ends_whatever_a_reader_does(state):
    program = f"""
import time
from e2mc_hf.data.read_ahead import ReadAhead
def slow():
    for number in range(10**9):
        time.sleep(0.001)
        yield number
blocks = ReadAhead(slow(), [10] + [{10**9 if state == "reading" else 10}] * 3)
next(blocks)
time.sleep(0.1)
print("done")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")
