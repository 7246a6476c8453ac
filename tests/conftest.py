"""Eight CPU devices, quick compilation, and every shape in a signature checked."""

import os

# Most of the tests' time is XLA's compilation of small programs that run once.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
install_import_hook("compo_jax", "beartype.beartype")
