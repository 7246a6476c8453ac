"""Incremental task arithmetic: each module is trained alone, and held where the other tasks' loss is flat."""

from compo_jax import adapters
from compo_jax.incremental.modes import Method, Mode
from compo_jax.incremental.regularisers import ita_penalty, mean_entry
from compo_jax.incremental.settings import Setup
from compo_jax.incremental.ways import register


def task_arithmetic(setup: Setup, method: Method) -> Mode:
    """Every module starts from the base, which the penalty keeps it near to in the curvature of the other tasks."""
    base, adapter = setup.base, method.adapter
    if adapter is None:
        raise ValueError(f"method {method.name!r} trains modules and needs an adapter, adapters.lora() say")
    forward = adapters.adapted(setup.model, adapter)
    return Mode(
        begin=lambda key, memory, task: adapter.init(key, base),
        features=lambda held, module, images: forward(held["base"], module, images, method="features"),
        hold=lambda memory: {"base": base},
        penalty=lambda held, module, f, alpha: ita_penalty(adapter.delta(module, held["base"]), f, alpha),
        alpha_unit=lambda memory, curvature: mean_entry(curvature),
        at_once=True,
    )


_PAPER = "Porrello et al., 2025, arXiv 2405.16350"
_PULL = (0.1, 0.05)

register("ita", task_arithmetic, f"incremental task arithmetic ({_PAPER})", averages=True, alpha=0.1, pull=_PULL)
register(
    "tak", task_arithmetic, "its penalty in Kronecker factors (TAK, 2026, arXiv 2602.17385)", averages=True,
    alpha=0.004, pull=_PULL, curvature="kronecker", coupled=True,
)  # fmt: skip
register("pull", task_arithmetic, f"without the penalty on weights ({_PAPER})", averages=True, pull=_PULL)
register("none", task_arithmetic, "modules trained alone, with no penalty", averages=True)
