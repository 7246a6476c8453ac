"""What holds an adaptation to a domain without labels: the pull to its sources, and consistency of answers."""

import numpy as np
import pytest
from modular_cases import ONE_DEVICE, small, stream

from compo_jax.data.augment import random_affine
from compo_jax.modular import Settings, adaptation, mean_source

PICTURES = stream(3, names=("a", "b", "c"))
NETWORK = small((3, 3), route="linear", shared_head=True, bn="layer")
ONE, BEGUN = mean_source(NETWORK)
SOURCES = NETWORK.variables["params"]["route"]
SETTINGS = Settings(steps=30, batch=24, learning_rate=0.03)


def adapted(route, **pulls):
    adapt = adaptation(
        ONE, PICTURES.prepare, SETTINGS, PICTURES.tasks[0].classes, route=route, runner=ONE_DEVICE, **pulls
    )
    return np.asarray(adapt(BEGUN, PICTURES.tasks[2], 0, None if route == "free" else SOURCES)["params"]["route"])


@pytest.mark.parametrize("route", ["free", "convex", "layers"])
def test_the_prior_holds_a_route_at_the_sources_mean(route):
    start = np.asarray(BEGUN["params"]["route"])
    way = [float(np.abs(adapted(route, prior=prior) - start).max()) for prior in (0.0, 1.0, 1000.0)]
    assert way[0] > way[1] > way[2]
    assert way[2] < 0.1 * way[0]


def test_the_prior_holds_a_soft_route_that_starts_at_equal_weights():
    one, begun = mean_source(small((3, 3), route="soft", templates=1, shared_head=True, bn="layer"))
    adapt = adaptation(
        one, PICTURES.prepare, SETTINGS, PICTURES.tasks[0].classes, route="free", runner=ONE_DEVICE, prior=0.1
    )
    np.testing.assert_array_equal(adapt(begun, PICTURES.tasks[2], 0, None)["params"]["route"], 0)


def test_consistency_asks_nothing_where_nothing_changes():
    plain = adapted("free")
    same = adapted("free", consistency=1.0, augment=lambda key, images: images)
    np.testing.assert_allclose(same, plain, atol=1e-4)
    assert np.abs(adapted("free", consistency=1.0, augment=random_affine) - plain).max() > 1e-3


def test_pulls_that_mean_nothing_are_told():
    for options, told in (
        ({"prior": -1.0}, "prior=-1.0: a weight is a finite number, 0 or more"),
        ({"consistency": float("nan"), "augment": random_affine}, "consistency=nan: a weight"),
        ({"consistency": 1.0}, "give both or neither"),
        ({"augment": random_affine}, "give both or neither"),
        ({"route": "fixed", "bn": "target", "prior": 1.0}, "prior pulls a route that is learned"),
    ):
        with pytest.raises(ValueError, match=told):
            adaptation(ONE, PICTURES.prepare, SETTINGS, PICTURES.tasks[0].classes, **options)
