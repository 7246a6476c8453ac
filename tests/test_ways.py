"""A way to learn is one file: a new one is written here, registered, and learns a stream beside the house's own."""

import importlib
from functools import partial

import jax
import numpy as np
import pytest
from jobs import ROOT
from way_cases import MODEL, noisy_pictures

from compo_jax import adapters, data, incremental
from compo_jax.incremental import Composition, Mode
from compo_jax.mesh import data_mesh
from compo_jax.train import jit_runner, read_result, write_result

# -- a way to learn, as its file would have it -------------------------------------------------------------------------


def first_session(setup, method) -> Mode:
    """A module is trained on the first task, and class means of its features classify all tasks."""

    def classify(snapshot):
        extract = partial(snapshot.extract, snapshot.pool.compose(setup.base))
        tasks = setup.stream.tasks[: snapshot.task + 1]
        z = np.concatenate([extract(task.train) for task in tasks])
        labels = np.concatenate([t.train.labels + o for t, o in zip(tasks, setup.stream.offsets, strict=False)])
        return incremental.linear(extract, incremental.nearest_class_mean(z, labels))

    return incremental.task_arithmetic(setup, method)._replace(
        lesson=lambda stream, task: incremental.each_task(stream, 0) if task == 0 else None,
        compose=lambda names, task: Composition(names[:1], names[:1]),
        classify=classify,
        at_once=False,
    )


@pytest.fixture
def way():
    yield incremental.register("first", first_session, "first-session adaptation, for this test", alpha=0.5)
    del incremental.WAYS["first"]


# -- what it learns ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setup():
    """Two tasks of two and three classes: noisy pictures of one pattern a class."""
    return noisy_pictures([[0, 1], [2, 3, 4]], noise=30)


RUNNERS = []


def shared_runner(loss, optimizer, **options):
    """One for all methods, whose steps differ in nothing but their context, to save compilations."""
    if not RUNNERS:
        RUNNERS.append(jit_runner(loss, optimizer, mesh=data_mesh(1), **options))
    return RUNNERS[0]


def learned(setup, methods, folder):
    return incremental.learn_stream(setup, methods, folder, runner=shared_runner)


def some_methods(*ways):
    lora = adapters.lora(1)
    return [incremental.method(w, *() if w == "ncm" else (lora,), learning_rate=1e-2) for w in ways]


def test_a_new_way_learns_a_stream_beside_others_and_goes_on_after_a_kill(tmp_path, setup, way):
    methods = some_methods("ita", "first", "joint", "ncm")
    one, two = learned(setup, methods, tmp_path / "whole")
    assert [*one.outcomes] == ["ita-lora", "first-lora", "joint-lora", "ncm"]
    assert [*one.learned] == ["ita-lora", "first-lora"] and [*two.learned] == ["ita-lora", "joint-lora"]
    for name in ("ita-lora", "first-lora", "ncm"):
        assert np.isfinite(one.outcomes[name].accuracy_matrix).tolist() == [[True, False], [False, False]]
        assert np.isfinite(two.outcomes[name].accuracy_matrix).tolist() == [[True, False], [True, True]]
    assert min(two.outcomes[name].final_accuracy for name in ("first-lora", "ncm")) > 0.4  # by chance 0.2
    assert one.outcomes["joint-lora"].final_accuracy is two.outcomes["joint-lora"].final_forgetting is None
    assert two.outcomes["ncm"].seconds is None and two.outcomes["first-lora"].seconds > 0
    assert np.isfinite(two.frozen.accuracy_matrix).tolist() == [[True, False], [True, True]]
    assert two.learners["first-lora"].method.alpha == 0.5
    assert two.learners["first-lora"].pool.names() == one.learners["ita-lora"].pool.names()[:1]

    stopped = learned(setup, methods, tmp_path / "stopped")
    next(stopped)
    stopped.close()
    before, after = learned(setup, methods, tmp_path / "stopped")
    assert before.restored and not before.learned and not after.restored
    for found, expected in ((before, one), (after, two)):
        for name in found.outcomes:
            np.testing.assert_array_equal(found.outcomes[name].accuracy_matrix, expected.outcomes[name].accuracy_matrix)
    (last,) = learned(setup, methods, tmp_path / "stopped")  # all is learned: it is told once more
    assert last.restored and last.task == 1

    results = incremental.summary(two, name="test", backbone="a small ViT")
    write_result(tmp_path / "results.json", results)
    again = read_result(tmp_path / "results.json", incremental.Results)
    for name, found in again.methods.items():
        np.testing.assert_array_equal(found.accuracy_matrix, results.methods[name].accuracy_matrix)
    assert again._replace(methods={}, frozen=None) == results._replace(methods={}, frozen=None)


def test_a_folder_goes_on_with_what_it_was_asked_for_alone(tmp_path, setup):
    methods, folder = some_methods("none"), tmp_path / "run"
    next(learned(setup, methods, folder))
    pictures = noisy_pictures([[0, 1], [2, 3]], noise=30)
    first, second = setup.stream.tasks
    darker = data.ArraySplit(second.test.images(np.arange(len(second.test))) // 2, second.test.labels)
    dark = setup.stream._replace(tasks=(first, second._replace(test=darker)))
    for changed, other, told in (
        (setup._replace(seed=1), methods, "seed: 0 there, 1 now"),
        (setup._replace(settings=setup.settings._replace(epochs=5)), methods, "settings.epochs: 4 there, 5 now"),
        (setup._replace(base=jax.tree.map(lambda x: -x, setup.base)), methods, "base: "),
        (setup._replace(stream=pictures.stream), methods, "task 1: .* 3, .* there, .* 2, .* now"),
        (setup._replace(stream=dark), methods, "images of task 1: .* there, .* now"),
        (setup._replace(model=setup.model.copy(activation="quick_gelu")), methods, "model.activation: gelu there"),
        (setup, [methods[0]._replace(learning_rate=0.5)], "none-lora.learning_rate: 0.01 there, 0.5 now"),
        (setup, [incremental.method("none", adapters.lora(2), learning_rate=1e-2)], "adapter: .*'rank': 1.*'rank': 2"),
        (setup, some_methods("none", "ncm"), "methods: "),
    ):
        with pytest.raises(ValueError, match=f"learned with other settings .*{told}"):
            next(learned(changed, other, folder))
    with_less_memory = setup._replace(settings=setup.settings._replace(eval_batch=8))
    assert next(learned(with_less_memory, methods, folder)).restored
    next(learned(setup._replace(seed=1), methods, tmp_path / "other"))


def test_modules_are_left_out_of_a_pool(tmp_path, setup):
    *_, after = learned(setup, some_methods("none"), tmp_path)
    results = incremental.summary(after, name="test", backbone="a small ViT")
    pool, (first, second) = after.learners["none-lora"].pool, setup.stream.tasks
    assert [skill.task for skill in results.unlearn] == [first.name, second.name]
    # of two modules, all but one is the other alone
    assert results.specialise[0].target == results.unlearn[1].control
    assert results.specialise[1].control == results.unlearn[0].target
    test = incremental.evaluator(incremental.features(MODEL, setup.stream, 16), setup.stream)
    head = incremental.pool_head(pool, pool.names(), after.reference.head, without=pool.names()[1:])
    expected = test(pool.compose(setup.base, pool.names()[:1]), head, 2).incremental
    np.testing.assert_allclose([results.specialise[0].target, results.specialise[0].control], expected)
    rest = incremental.skills("subtract", pool, setup.base, after.reference.head, test)
    assert rest.shape == (2, 2)


# -- names -------------------------------------------------------------------------------------------------------------


def test_unknown_ways_and_options_and_names_that_are_taken_are_told(way):
    with pytest.raises(ValueError, match="unknown way to learn 'both'; known are .*ita, tak, .*first: register"):
        incremental.method("both", adapters.lora(1))
    with pytest.raises(ValueError, match="called 'first' already \\(first-session adaptation, for this test\\)"):
        incremental.register("first", first_session, "again")
    with pytest.raises(ValueError, match="a method has no alfa; its options are adapter, learning_rate, alpha"):
        incremental.register("second", first_session, "with a slip", alfa=1.0)
    assert "second" not in incremental.WAYS


def test_a_method_s_options_go_before_its_way_s():
    assert incremental.method("ita", adapters.lora(1), learning_rate=1e-3).alpha == 0.1
    tak = incremental.method("tak", adapters.lora(1), learning_rate=1e-3, alpha=0.5, coupled=False)
    assert (tak.name, tak.alpha, tak.curvature, tak.coupled) == ("tak-lora", 0.5, "kronecker", False)


def test_a_method_without_what_it_needs_and_two_of_one_name_are_told(tmp_path, setup):
    with pytest.raises(ValueError, match="'ita' trains modules and needs an adapter"):
        next(learned(setup, [incremental.method("ita")], tmp_path))
    with pytest.raises(ValueError, match="'ita-lora' can't train: it lacks a learning rate"):
        next(learned(setup, [incremental.method("ita", adapters.lora(1))], tmp_path))
    with pytest.raises(ValueError, match="two methods have one name: none-lora, none-lora"):
        next(learned(setup, some_methods("none", "none"), tmp_path))


def test_the_main_job_s_names_are_the_registry_s(monkeypatch, setup):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    options = importlib.import_module("incremental_options")
    assert {name.partition("-")[0] for name in options.METHODS} == set(incremental.WAYS)
    kinds = {"lora": adapters.lora(1), "ia3": adapters.ia3(), "full": adapters.full()}
    for name in options.METHODS:
        way, _, kind = name.partition("-")
        mode = incremental.WAYS[way].mode(setup, incremental.method(way, kinds.get(kind)))
        assert (mode.begin is None) is (name in options.FROZEN)
        assert mode.at_once is options.at_once((name,))
