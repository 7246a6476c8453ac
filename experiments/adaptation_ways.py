"""How modular_adaptation.py adapts to a domain: a name for each of its rows.

Nothing here loads JAX, as of all options.
"""

from typing import Literal, NamedTuple


class Way(NamedTuple):
    """How a domain is adapted to: the route that it starts from, what of it is learned, BN, the group of its report,
    and the weights of the pull to the sources and of consistency under small affine maps (see `modular.adaptation`)."""

    start: Literal["best", "mean", "soup"]
    route: Literal["fixed", "free", "convex", "layers"]
    bn: Literal["source", "target", "affine"]
    group: str
    prior: float = 0.0
    consistency: float = 0.0


BASELINE, MEAN, ORACLE = "best source (by objective)", "mean of sources", "best source (by labels)"
UNADAPTED = {
    BASELINE: Way("best", "fixed", "source", "sources"),
    MEAN: Way("mean", "fixed", "source", "sources"),
    ORACLE: Way("best", "fixed", "source", "oracle"),
}
ADAPTED = {
    "route from best source": Way("best", "free", "source", "order"),
    "route from mean": Way("mean", "free", "source", "order"),
    "convex mixture": Way("mean", "convex", "source", "order"),
    "convex mixture by layer": Way("mean", "layers", "source", "order"),
    "convex mixture, prior": Way("mean", "convex", "source", "order", prior=0.1),
    "convex mixture, consistent": Way("mean", "convex", "source", "order", consistency=1.0),
    "route from mean, prior": Way("mean", "free", "source", "order", prior=0.1),
    "route from mean, consistent": Way("mean", "free", "source", "order", consistency=1.0),
    "AdaBN, best source": Way("best", "fixed", "target", "bn"),
    "AdaBN, mean of sources": Way("mean", "fixed", "target", "bn"),
    "Tent, best source": Way("best", "fixed", "affine", "bn"),
    "route from best source + AdaBN": Way("best", "free", "target", "order+bn"),
    "route from mean + AdaBN": Way("mean", "free", "target", "order+bn"),
    "convex mixture + AdaBN": Way("mean", "convex", "target", "order+bn"),
    "convex mixture, consistent + AdaBN": Way("mean", "convex", "target", "order+bn", consistency=1.0),
    "route from best source + Tent": Way("best", "free", "affine", "order+bn"),
    "soup of sources + AdaBN": Way("soup", "fixed", "target", "order+bn"),
    "soup of sources + Tent": Way("soup", "fixed", "affine", "order+bn"),
    "route from soup + AdaBN": Way("soup", "free", "target", "order+bn"),
    "route from soup + Tent": Way("soup", "free", "affine", "order+bn"),
}
