"""What the routes of the first ordered method say, each beside random routes: figures with captions, as HTML."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from compo_jax.modular import analysis
from compo_jax.report import route_figures as figures
from compo_jax.report.multitask_numbers import sizes
from compo_jax.report.numbers import Metrics, decimal, fitting, require, signed
from compo_jax.report.previous import block, html_table

_DRAWS = 200  # of random routes
_COUNTED = "Layers and templates count from 0; first seed."
Weights = Float[np.ndarray, "tasks layers templates"]


class _Numbers(NamedTuple):
    """What is held against random routes."""

    mean: Any  # distance of two tasks; nan for one task
    least: Any
    similarity: Any  # (layers, layers), mean over tasks
    usage: Any  # (templates,), falling
    dead: Any

    @classmethod
    def apart(cls, row: np.ndarray, layers: int) -> "_Numbers":
        """Of a row as `_statistics` gives it."""
        return cls(*row[:2], row[2 : 2 + layers**2].reshape(layers, layers), row[2 + layers**2 : -1], row[-1])


def _statistics(weights: Any) -> np.ndarray:
    """All numbers of `_Numbers` in one row, for one pass over the random routes."""
    pairs = analysis.task_distances(weights)[np.triu_indices(len(weights), 1)]
    two = [pairs.mean(), pairs.min()] if len(pairs) else [np.nan, np.nan]
    similarity = analysis.layer_similarity(weights).mean(0)
    usage = np.sort(analysis.usage(weights))[::-1]
    return np.concatenate([two, similarity.ravel(), usage, [len(analysis.dead(weights))]])


def _hard(given: Mapping[str, Any], where: str, metrics: Metrics) -> list[Weights]:
    """The one-hot routes of each seed; ValueError for a template that isn't there."""
    require(given, ("templates", "hard"), where)
    shape = (*sizes(metrics), metrics["net"]["layers"])
    hard = fitting(given["hard"], shape, f"{where}hard", "seeds by tasks by layers")
    if not np.isin(hard, np.arange(given["templates"])).all():
        raise ValueError(
            f"{where}hard in the metrics has a template that is not among the {given['templates']}, from 0 on: the "
            "routes may be of another network"
        )
    return list(np.eye(given["templates"])[hard.astype(int)])


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(str(name) for name in names)


def _between_tasks(
    routes: Sequence[Weights], tasks: Sequence[str], own: _Numbers, mean: _Numbers, deviation: _Numbers
) -> str:
    matrix = analysis.task_distances(routes[0])
    pair = np.unravel_index(np.argmin(matrix + np.eye(len(tasks))), matrix.shape)
    by_seed = [_statistics(weights)[0] for weights in routes[1:]]
    others = f" (other seeds {_listed(f'{x:.2f}' for x in by_seed)})" if by_seed else ""
    return block(
        figures.distances(matrix, analysis.dendrogram(matrix), tasks),
        "0 is the same route and 1 no common template at any layer; look for groups of tasks that are alike. Mean over "
        f"pairs {own.mean:.2f}{others}, of random routes {mean.mean:.2f} ± {deviation.mean:.2f}. Nearest are "
        f"{tasks[pair[0]]} and {tasks[pair[1]]}, {own.least:.2f}; the nearest of random routes {mean.least:.2f} ± "
        f"{deviation.least:.2f}: groups no nearer than that say nothing. Random routes use all "
        "templates alike; a few that are used much bring tasks nearer, too. First seed.",
        html_table(
            ["distance", *tasks],
            ((task, [f"{x:.2f}" for x in row]) for task, row in zip(tasks, matrix, strict=True)),
        ),
    )


def _removal(given: Mapping[str, Any], where: str, shape: tuple[int, int], order: list[int], used: np.ndarray) -> str:
    require(given, ("drop", "null", "deviation"), where)
    drop, null, deviation = (
        fitting(given[key], shape, where + key, "templates by tasks") for key in ("drop", "null", "deviation")
    )
    # places of different tasks are drawn almost independently of one another
    means = drop.mean(1), null.mean(1), np.sqrt((deviation**2).sum(1)) / shape[1]
    beyond = [m for m in order if means[0][m] > means[1][m] + 2 * means[2][m]]
    images = f", {given['images']} images of each task" if given.get("images") else ""
    named = "templates " + _listed(beyond) if beyond else "none"
    return block(
        figures.removal(*means, order),
        "A template is removed and its layers take their next best; beside, as many places drawn at random lose what "
        "they have (mean ± standard deviation over draws, taken as independent between tasks). A much used "
        "template costs much either way: what says that it does work of its own is a drop beyond the bar. "
        f"Beyond two deviations: {named}. Mean over tasks{images}; first seed.",
        html_table(
            ["template", "places (%)", "drop (points)", "random places", "±"],
            (
                (str(m), [decimal(100 * used[m]), *(signed(x[m]) for x in means[:2]), decimal(100 * means[2][m])])
                for m in order
            ),
        ),
    )


def route_blocks(metrics: Metrics) -> Iterator[str]:
    """The figures of the first method in `routes`, none where there is none; see `report.multitask`."""
    from scipy.cluster.hierarchy import leaves_list

    if not (every := metrics.get("routes")):
        return
    name, given = next(iter(every.items()))
    tasks = metrics["tasks"]
    routes = _hard(given, f"routes.{name}.", metrics)
    weights = routes[0]
    layers, count = weights.shape[1:]
    null = analysis.against_random(_statistics, weights, jax.random.key(0), _DRAWS)
    own, mean, deviation, above = (_Numbers.apart(row, layers) for row in null)
    order = np.arange(len(tasks))
    if len(tasks) > 1:
        order = leaves_list(analysis.dendrogram(analysis.task_distances(weights)))

    hard, surety = weights.argmax(-1), None
    if given.get("soft") is not None:
        soft = fitting(given["soft"], weights.shape, f"routes.{name}.soft", "tasks by layers by templates")
        surety = np.take_along_axis(soft, hard[..., None], -1)[order, :, 0]
    ordered = [tasks[i] for i in order]
    sure = (
        " Beside, the weight that the template had before routes were fixed: 1 was decided."
        if surety is not None
        else ""
    )
    yield block(
        figures.chosen(hard[order], count, ordered, surety),
        f"{name}: down a column, tasks of one colour share that layer; along a row, a colour that comes again is a "
        f"block invoked twice.{sure} Tasks in the order of the dendrogram. {_COUNTED}",
        html_table(
            ["task", *(f"layer {i}" for i in range(layers))],
            ((task, [str(m) for m in row]) for task, row in zip(ordered, hard[order], strict=True)),
        ),
    )
    if len(tasks) > 1:
        yield _between_tasks(routes, tasks, own, mean, deviation)
    if layers > 1:
        pairs = np.triu_indices(layers, 1)
        rare = int((above.similarity[pairs] <= 0.05).sum())
        yield block(
            figures.similarity(own.similarity, mean.similarity, above.similarity),
            "The part of the tasks that take the same template at both layers. A loop over blocks would be a bright "
            "line beside the diagonal, one block again and again a bright square. A dot: at most 5 % of random routes "
            f"are as large. Such pairs: {rare} of {len(pairs[0])}, by chance {0.05 * len(pairs[0]):.1f} or fewer. "
            f"{_COUNTED}",
            html_table(
                ["|cos|", *(str(i) for i in range(layers))],
                ((str(i), [f"{x:.2f}" for x in row]) for i, row in enumerate(own.similarity)),
            ),
        )
    used = analysis.usage(weights)
    falling = np.argsort(-used, kind="stable").tolist()
    dead = analysis.dead(weights)
    yield block(
        figures.usage(used, mean.usage, deviation.usage, falling),
        "Bars steeper than the band are a few templates that do most of the work, flatter ones an evenness that "
        f"chance would not give. Dead, without any place: {_listed(dead) if len(dead) else 'none'} ({len(dead)} of "
        f"{count}; of random routes {mean.dead:.1f} ± {deviation.dead:.1f}). {_COUNTED}",
        html_table(
            ["template", "places (%)", "random, same rank (%)", "±"],
            (
                (str(m), [decimal(100 * x) for x in (used[m], mean.usage[i], deviation.usage[i])])
                for i, m in enumerate(falling)
            ),
        ),
    )
    if removed := (metrics.get("removal") or {}).get(name):
        yield _removal(removed, f"removal.{name}.", (count, len(tasks)), falling, used)
