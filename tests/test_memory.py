"""Memory that is freed stays with the process where this is asked for, seen by the pages that are touched anew."""

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
