"""Eight CPU devices, and every shape in a signature checked."""

from jaxtyping import install_import_hook

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
install_import_hook("compo_jax", "beartype.beartype")
