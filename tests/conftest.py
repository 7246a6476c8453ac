"""Eight CPU devices, quick compilation, and every shape in a signature checked."""

import os
import tempfile
from importlib.metadata import version
from pathlib import Path

# Most of the tests' time is XLA's compilation of small programs that run once: without LLVM's optimisations and the
# emitters of fused loops, where XLA still has the others, it takes a quarter of the time.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
if version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit the folder where the experiments' programs are kept
    CACHE = tempfile.TemporaryDirectory(prefix="compo_jax_tests_")
    os.environ["COMPO_JAX_TESTS_CACHE"] = CACHE.name

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_traceback_in_locations_limit", 0)  # a tenth of the time: where each operation was written
jax.config.update("jax_num_cpu_devices", 8)
install_import_hook("compo_jax", "beartype.beartype")
# The workers compile many programs alike; the folder is empty when a session begins.
jax.config.update("jax_compilation_cache_dir", os.environ["COMPO_JAX_TESTS_CACHE"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

MAPS = Path("/proc/self/maps")


def pytest_runtest_teardown(item, nextitem):
    """Forgets compiled programs before a worker dies of them: each takes memory maps, of which it may have 65,530."""
    between_files = nextitem is None or nextitem.path != item.path
    if between_files and MAPS.exists() and MAPS.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
