"""What was silent, or raw, in the modular wing: one row each, and one sentence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from modular_cases import held_out, small, stream, trains

from compo_jax.data.splits import ArraySplit
from compo_jax.modular import (
    ModularNet,
    Settings,
    accuracies,
    add_templates,
    analysis,
    balanced_batches,
    balanced_eval,
    gumbel,
    hard,
    information_maximisation,
    learned_temperature,
    learner,
    macs,
    mean_source,
    mix_templates,
    one_source,
    optimizer,
    remove_template,
    routes,
    set_route,
    soft,
    statistics,
    straight_through,
)
from compo_jax.modular.losses import by_task

SMALL = NET, VARIABLES = small()
LINEAR = small((3, 3), route="linear")
KERNELS = VARIABLES["params"]["templates"]
LOGITS = np.zeros((2, 3, 3), np.float32)
KEY = jax.random.key(0)
PICTURES = stream()
inf, nan = float("inf"), float("nan")


def logits(value, at=(1, 2)):
    changed = LOGITS.copy()
    changed[at] = value
    return jnp.asarray(changed)


def relabelled(labels):
    split = trains(PICTURES)[1]
    other = ArraySplit(split.pixels, split.labels)
    other.labels = labels(other.labels)
    return [trains(PICTURES)[0], other]


SETTINGS = {
    "steps": (0, -1, 2.5, True, nan, "3"),
    "batch": (0, -2, 1.5),
    "learning_rate": (-1.0, 0.0, nan, inf),
    "weight_decay": (-0.1, nan),
    "warmup": (-0.1, 1.0, 2.0, nan),
    "clip": (-1.0, 0.0, nan),
    "relaxation": ("mean", "hard"),
    "route_rate": (-1.0, inf),
    "entropy": (-0.1, nan),
    "usage": (-0.1, nan),
    "temperature": ((1.0, 0.0), (-1.0, 0.1), (1.0,), 1.0, (nan, 1.0)),
    "phases": ((0.9, 0.1), (-0.1, 0.5), (0.2, 1.1), (nan, 1.0), (0.5,)),
    "statistics": ("running",),
    "estimate": (0, -1),
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in SETTINGS.items() for value in values])
def test_a_setting_out_of_its_range_is_told_where_it_is_made(name, value):
    sound = Settings(20)
    for make in (lambda: Settings(**{"steps": 20} | {name: value}), lambda: sound._replace(**{name: value})):
        with pytest.raises(ValueError, match=rf"can't have these settings: {name}=.* is no"):
            make()


def test_all_settings_out_of_their_range_are_told_at_once():
    with pytest.raises(ValueError, match=r"steps=0 .*; clip=-1\.0 .*; phases=\(0\.9, 0\.1\) "):
        Settings(0, clip=-1.0, phases=(0.9, 0.1))
    assert Settings(20, clip=inf, usage=0.0, phases=(0.0, 0.0))._replace(steps=np.int64(3)).steps == 3
    assert repr(Settings(20)).startswith("Settings(steps=20, batch=32")


def test_what_was_learned_was_learned_at_the_last_temperature_before_the_route_was_fixed():
    """Phases that begin at once know the first temperature alone."""
    assert float(learned_temperature(Settings(steps=7, phases=(0.5, 0.5), temperature=(1.0, 0.1)))) == 1.0
    of_last = learned_temperature(Settings(steps=10, phases=(0.0, 1.0), temperature=(1.0, 0.1)))
    np.testing.assert_allclose(of_last, 0.1**0.9, rtol=1e-6)  # step 9 of 10


@pytest.mark.parametrize("steps, warmup", [(1, 0.05), (2, 0.0), (3, 0.99)])
def test_a_training_of_few_steps_has_a_rate(steps, warmup):
    transform = optimizer(Settings(steps, warmup=warmup))
    params = {"w": jnp.ones(2)}
    state = transform.init(params)
    for _ in range(steps):
        updates, state = transform.update({"w": jnp.ones(2)}, state, params)
    assert np.all(np.asarray(updates["w"]) < 0)


ROWS = {
    # routes
    **{f"{name} of NaN": (lambda f=f: f(logits(nan)), r"at \[1, 2\] they are \[nan, nan, nan\]")
       for name, f in (("soft", soft), ("hard", hard), ("indices", routes.indices),
                       ("straight_through", straight_through), ("gumbel", lambda x: gumbel(x, KEY)))},
    "hard of infinity": (lambda: hard(logits(inf, (0, 1, 2))), r"at \[0, 1\] they are \[0.0, 0.0, inf\]"),
    "no template left": (lambda: soft(logits(-inf)), "or no template is left"),
    **{f"temperature {t}": (lambda t=t: soft(jnp.asarray(LOGITS), t), "temperature is a positive number")
       for t in (0.0, -1.0, nan, inf)},
    **{f"smoothing {s}": (lambda s=s: routes.to_logits(hard(jnp.asarray(LOGITS)), s), f"smoothing={s} is no share")
       for s in (2.0, -0.1, nan)},
    "logits of logits": (lambda: routes.to_logits(logits(2.0)), "none negative and of sum 1"),
    "logits of NaN weights": (lambda: routes.to_logits(logits(nan)), "none negative and of sum 1"),
    "a mean route, smoothing 2": (lambda: mean_source(small((3, 3), shared_head=True), 2.0), "smoothing=2.0 is no"),
    "a source, smoothing -1": (lambda: one_source(SMALL, 0, -1.0), "smoothing=-1.0 is no share"),
    "a mean of sources, no shared head": (lambda: mean_source(SMALL), "train the sources with shared_head=True"),
    "no such source": (lambda: one_source(SMALL, 2), r"tasks \[2\] were asked of a network that has 2"),
    "a fixed route out of range": (lambda: routes.fixed(np.array([0, 3]), 3), r"through the templates \[0, 3\]"),
    "set_route of NaN": (lambda: set_route(VARIABLES, logits(nan)), "a route's logits are finite"),
    # mixing
    **{f"template {m}": (lambda m=m: mix_templates(KERNELS, jnp.array([0, m])), f"\\[0, {m}\\], and there are 3")
       for m in (3, -1)},
    "NaN weights": (lambda: mix_templates(KERNELS, logits(nan)), "a route's weights are finite numbers"),
    # editing
    **{f"remove {m}": (lambda m=m: remove_template(SMALL, m), f"no template {m} to remove: there are 3")
       for m in (-1, 3)},
    "the only template": (lambda: remove_template(small(templates=1), 0), "the only template can't be removed"),
    "no template to add": (lambda: add_templates(SMALL, jax.tree.map(lambda x: x[:0], KERNELS)),
                           "no template was given to add"),
    "ragged templates": (lambda: add_templates(SMALL, KERNELS | {"conv1": KERNELS["conv1"][:1]}),
                         "stacked on axis 0"),
    "NaN templates": (lambda: add_templates(SMALL, jax.tree.map(lambda x: x * nan, KERNELS)),
                      "the new template holds NaN or infinite numbers in conv1, conv2"),
    # networks
    **{f"{name}=0": (lambda name=name: ModularNet((3, 2), **{name: 0}), f"{name}=0: a whole number, 1 or more")
       for name in ("layers", "templates", "width", "patch")},
    "no tasks": (lambda: ModularNet(()), "needs a task"),
    "an unknown block": (lambda: ModularNet((3, 2), block="dense"), "no block is called 'dense'"),
    "no pixels": (lambda: macs(NET, 0), "size=0: a whole number"),
    "patches with a rest": (lambda: macs(NET, 5), "5x5 pixels can't be cut into patches of 2"),
    "channels first": (lambda: jax.eval_shape(NET.apply, VARIABLES, jnp.zeros((2, 4, 3, 6, 6))), "channels first"),
    "-inf in a linear route": (lambda: learner(LINEAR.net, PICTURES.prepare, Settings(2)).train(
        set_route(LINEAR.variables, logits(-inf, (0, 0, 1))), trains(PICTURES), 0), "a linear route holds NaN or inf"),
    "rows that are not of all tasks": (lambda: by_task(jnp.zeros((3, 4)), 4), "3 rows of 4 tasks: .* devices divide"),
    "statistics of unlike batches": (lambda: statistics(NET, PICTURES.prepare)(VARIABLES, (
        next(balanced_batches(trains(PICTURES), n, 0)(0)) for n in (4, 2))), r"of one size, .* \[2, 4\] images"),
    # images
    **{f"labels {name}": (lambda f=f: learner(NET.clone(classes=(3, 3)), PICTURES.prepare, Settings(2)).train(
        VARIABLES, relabelled(f), 0), "task 1 has labels from .* and a head of 3 classes")
       for name, f in (("from 1", lambda y: y + 1), ("below 0", lambda y: y - 1), ("of floats", lambda y: y / 2))},
    "a head too small": (lambda: accuracies(NET, PICTURES.prepare)(VARIABLES, held_out(PICTURES)),
                         "task 1 has labels from 0 to 2 and a head of 2 classes"),
    "batches of none": (lambda: balanced_batches(trains(PICTURES), 0, 0), "batch=0: a whole number, 1 or more"),
    "negative seeds": (lambda: balanced_batches(trains(PICTURES), 2, -1), "seed=-1: a whole number, 0 or more"),
    "batches to evaluate": (lambda: next(balanced_eval(trains(PICTURES), 0)), "batch=0: a whole number"),
    "information of NaN": (lambda: information_maximisation(jnp.array([[0.0, nan]])), "holds NaN .* the logits' soft"),
    "information of infinity": (lambda: information_maximisation(jnp.array([[0.0, inf]])), "holds NaN"),
    "information of nothing": (lambda: information_maximisation(jnp.zeros((0, 3))), "needs an image and a class"),
    # what routes say
    **{f"{f.__name__} of {kind}": (lambda f=f, x=x: f(x), message)
       for f in (analysis.task_distances, analysis.layer_similarity, analysis.usage, analysis.entropies, analysis.dead)
       for kind, x, message in (("logits", logits(2.0), "none negative and of sum 1"),
                                ("NaN", logits(nan), "none negative and of sum 1"),
                                ("no tasks", np.zeros((0, 3, 3)), r"and these are \(0, 3, 3\)"))},
    "a dendrogram of NaN": (lambda: analysis.dendrogram(np.full((3, 3), nan)), "9 of them not finite"),
    "rerouted from nowhere": (lambda: analysis.rerouted(jnp.asarray(LOGITS), jnp.full((2, 3), 3)), "there are 3"),
    "no draws": (lambda: analysis.removal(lambda x: np.zeros(2), jnp.asarray(LOGITS), KEY, 0), "a null of 0 draws"),
    "one draw": (lambda: analysis.against_random(lambda x: 0.0, hard(jnp.asarray(LOGITS)), KEY, 1), "null of 1 draws"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_what_was_silent_is_told(name):
    act, message = ROWS[name]
    with pytest.raises(ValueError, match=message):
        act()


def test_what_is_traced_gives_nan_and_no_guess():
    traced = jax.jit(information_maximisation)(jnp.array([[0.0, nan]]))
    assert np.isnan(traced)
    assert np.isnan(routes.entropy(jnp.array([0.5, nan])))
    mixed = jax.jit(mix_templates)({"w": jnp.arange(3.0)}, jnp.array([3, 0]))["w"]
    assert np.isnan(mixed[0]) and mixed[1] == 0
    assert np.array_equal(jax.jit(lambda: hard(jnp.array(LOGITS)))(), hard(jnp.array(LOGITS)))  # closed over
    assert np.array_equal(jax.jit(lambda: set_route(VARIABLES, jnp.asarray(LOGITS)))()["params"]["route"], LOGITS)


def test_a_template_that_a_layer_can_t_take_is_no_error():
    barred = logits(-inf, (0, 1, 2))
    np.testing.assert_allclose(soft(barred)[0, 1], [0.5, 0.5, 0.0])
    assert routes.indices(set_route(VARIABLES, barred)["params"]["route"])[0, 1] == 0
    assert np.isfinite(information_maximisation(jnp.array([[0.0, -inf, 1.0]])))
