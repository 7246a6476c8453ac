"""How the C library handles memory that is freed, which XLA's CPU backend takes and frees at every call."""

import ctypes
import gc
import sys
from collections.abc import Callable

_TRIM, _TOP, _MAPPED = -1, -2, -3  # options of glibc's mallopt, from malloc.h
_MIB = 2**20


def _of_glibc(name: str) -> Callable[..., int] | None:
    """The function of that name; None where there is no glibc."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def keep_memory() -> bool:
    """Tells glibc to keep what is freed, up to 2 GiB, for the rest of the process; False where there is no glibc.

    XLA takes the arrays between a model's layers anew at each call. Larger than 32 MiB they come from the system each
    time, which clears every page when it is first touched: a third of the time of a small model's training step. The
    process stays as large as it was at its peak, or 2 GiB where that is less. Blocks of more than 1 GiB still go back,
    and so does all at a call of `give_back_memory`.
    """
    set_option = _of_glibc("mallopt")
    if set_option is None:
        return False
    # Not one arena for all threads, though those of their own can't grow beyond 64 MiB: they'd wait for each other.
    values = {_MAPPED: 1024 * _MIB, _TRIM: 2048 * _MIB - 1, _TOP: 64 * _MIB}
    return all([set_option(option, value) == 1 for option, value in values.items()])


def give_back_memory() -> None:
    """Gives the system back what is freed, before something large is taken.

    JAX holds a NumPy array that it took over without a copy until Python next collects garbage, however long ago it
    was done with it; and glibc keeps what lies below a block that is in use, until it is asked.
    """
    gc.collect(0)  # JAX's own hook lets go of its arrays at any collection
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)
