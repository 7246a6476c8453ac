"""Memory that is freed stays with the process where this is asked for, seen by the pages that are touched anew; and
goes back where that is asked for, seen by what the process has."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from compo_jax.memory import keep_memory
kept = sys.argv[1] == "keep" and keep_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**24)  # 128 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(kept, faults(), faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_kept_when_asked_for():
    def told(how):
        return subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True).stdout

    kept, first, second = told("keep").split()
    if kept == "False":
        pytest.skip("another C library")
    assert int(first) > 50 and int(second) < 10
    assert int(told("leave").split()[2]) > 50


TAKEN_OVER = """
import numpy as np
from compo_jax.compose.entries import filled
from compo_jax.memory import give_back_memory
def resident():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) // 1024
row = np.broadcast_to(np.float32(1), 2**24)  # 64 MiB
fill = lambda: filled((2, 2**24), np.float32, [row, row])
empty = resident()
fill()
full = resident()
again = fill()
most = resident()
del again
give_back_memory()
print(empty, full, most, resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's")
def test_arrays_that_jax_took_over_go_back():
    told = subprocess.run([sys.executable, "-c", TAKEN_OVER], capture_output=True, text=True, check=True).stdout
    empty, full, most, left = map(int, told.split())
    assert full - empty >= 127 and full - left >= 127  # both rows, 128 MiB
    assert most - full < 64  # the first array went before the second came
