"""What experiments on modular networks reached, as small results with numbers that can be checked by hand."""

import jax
import numpy as np

from compo_jax import modular
from compo_jax.modular import Settings
from compo_jax.modular.analysis import Removal
from compo_jax.modular.evaluate import Gap
from compo_jax.modular.forecast import Rerouting
from compo_jax.modular.results import (
    AdaptationResults,
    Curves,
    Job,
    LearnedOrder,
    MultitaskMethod,
    MultitaskResults,
    NetShape,
    NewTasks,
    OrderAnalysis,
    ReuseMethod,
    ReuseResults,
    Sources,
    Target,
    TransferMethod,
    TransferResults,
)

UNKNOWN = np.nan
HARD = np.array([[0, 1, 0, 1], [0, 1, 2, 0], [0, 0, 2, 0]])  # three tasks, four layers; template 3 of four is dead


def job(name, images, seeds=(3, 4)):
    """Of each task or domain so many test images, and twice as many to train."""
    shape = {"layers": 2, "templates": 3, "width": 8, "patch": 4, "block": "basic <u>", "size": 28}
    net = NetShape(**shape, bn="task", route="hard", start="shared", groups=1)
    train = {task: 2 * count for task, count in images.items()}
    return Job(name, "glyphs <i>", seeds, 1234.5, net, Settings(40, phases=(0.2, 0.7)), train, images)


def transfer():
    few = {
        "head": [[0.4, 0.6], [0.5, 0.7]], "head+route": [[0.5, 0.6], [0.6, 0.9]], "_<s>untrained": [[0.1, 0.1]] * 2,
    }  # fmt: skip
    every = {
        "head": [[0.6, 0.8], [0.7, 0.9]], "head+route": [[UNKNOWN, 0.8], [0.6, 0.9]], "_<s>untrained": [[0.2, 0.2]] * 2,
    }  # fmt: skip

    def parts(accuracy, chosen):
        seeds = [{name: np.array(values[i]) for name, values in accuracy.items()} for i in range(2)]
        return tuple(NewTasks(*pair) for pair in zip(seeds, chosen, strict=True))

    return TransferResults(
        job("transfer <1>", {"a<b>": 100, "b": 50, "$c_{": 50, "x": 10, "y": 10}),
        Settings(20),
        (None, 10),
        (("a<b>", "b"), ("b", "$c_{")),
        (("x", "y"), ("x",)),
        {
            "head": TransferMethod(650, 651, False),
            "head+route": TransferMethod(714, 715, False),
            "_<s>untrained": TransferMethod(714, 715, True),
        },
        (Sources(np.array([0.9, 0.7])), Sources(np.array([0.8]))),
        (parts(every, [("x", "y"), ("x", "x")]), parts(few, [("x", "<s>y"), ("x", "x")])),
    )


def adaptation():
    """Two targets of three domains, in two seeds."""
    accuracy = {
        "oracle": [[0.55, 0.9], [0.7, 0.8]], "Tent": [[0.7, 0.5], [0.9, 0.5]],
        "best source": [[0.5, 0.6], [0.6, 0.7]], "<s>route": [[0.6, 0.6], [0.8, 0.9]],
    }  # fmt: skip
    objective = {
        "oracle": [[-1.3, UNKNOWN], [-1.1, -1]], "Tent": [[-1.2, UNKNOWN], [-1.4, -1]],
        "best source": [[-1.0, -1], [-1.0, -1]], "<s>route": [[-1.1, -1], [-1.3, -1]],
    }  # fmt: skip

    def part(seed, target):
        of = lambda values: {name: np.array(rows[seed][target]) for name, rows in values.items()}
        adapted = {"<s>route": np.array([[0.5, 0.25, 0.25], [0, 1, 0]])}
        sources = np.full(2, (0.2, 0.4)[target] + 0.1 * seed)
        return Target(of(accuracy), of(objective), sources, "x", np.eye(3)[[[0, 2], [1, 1]]], adapted)

    at_home = tuple(Sources(np.full(2, value)) for value in (0.9, 0.8))  # without photo, without art
    names = ("photo", "art <s>", "$sketch_{")
    return AdaptationResults(
        job("adaptation <1>", dict.fromkeys(names, 20)),
        Settings(10, route_rate=100.0),
        3.0,
        names,
        names[:2],
        ("one", "two"),
        "the domains are one set, <s>blurred",
        "best source",
        {"oracle": "oracle", "Tent": "bn", "best source": "sources", "<s>route": "order"},
        (at_home, at_home),
        tuple(tuple(part(seed, target) for target in range(2)) for seed in range(2)),
    )


def reuse():
    def method(accuracy, route, parameters=2_000_000, gap=None):
        route, both = np.array(route), np.ones(2, int)
        macs = 1_500_000 * route.shape[1]
        costs = (parameters * both, macs * both, np.array([100.0, 120.0]))
        return ReuseMethod(np.array(accuracy), np.array([0.9, 0.7]), *costs, 2 * both, route, gap)

    points = ([[0.7], [0.6]], [[0.4], [UNKNOWN]], [[0.6], [0.6]], [[0.75], [0.65]])
    methods = {
        "2-layers": method([0.5, 0.6], [[0, 1]] * 2),
        "aabb": method([0.6, 0.6], [[0, 0, 1, 1]] * 2),
        "learned": method([0.75, 0.65], [[0, 1, 0, 1], [1, 1, 1, 0]], 2_000_008, Gap(*map(np.array, points))),
    }
    return ReuseResults(job("reuse <1>", {"all": 100}), 10, 2, "2-layers", methods)


def multitask():
    order = "ordered-4"
    names = ("greek <i>", "n$ko", "vai")

    def method(accuracy, parameters=250_000, order=None):
        both = np.ones(2, int)
        costs = (parameters * both, 37_850_000 * both, np.array([10.0, 14.0]))
        return MultitaskMethod(np.array(accuracy), *costs, order)

    reached = [[1.0, 0.8, 0.9], [0.9, 0.9, 0.6]]
    gap = Gap(np.full((2, 3), 0.9), np.array([[0.2] * 3, [0.4] * 3]), np.full((2, 3), 0.6), np.array(reached))
    curves = Curves(*(np.array([row] * 2) for row in ([10, 20, 40], [2.0, 1, 0.5], [1.0, 0.5, 0], [0.0, 0.1, 0.2])))
    hard = np.stack([HARD, np.zeros_like(HARD)])
    learned = LearnedOrder(hard, 0.6 * np.eye(4)[hard] + 0.1, gap, curves)
    drop = np.array([[0.3, 0.2, 0.1], [0.1, 0.1, 0.1], [0.0, 0.1, 0.2], [0.0, 0.0, 0.0]])
    lost = Removal(drop, np.array([[0.1] * 3] * 3 + [[0.0] * 3]), np.array([[0.03, 0.0, 0.04]] * 4))
    amounts = np.array([0.1, 0.5, 1.0])
    true = np.array([0.5 + k * amounts for k in (1, 3, 0, 2)])
    rerouting = Rerouting(2, 2, 2, 64, 0.5, amounts, true, true + amounts**2, np.array([0.05, 0.25, 0.5]))
    random = modular.beside_random(np.eye(4)[HARD], jax.random.key(0), 10)
    methods = {
        "single-task": method([[0.9, 0.8, 0.7], [0.9, 0.8, 0.4]], 1_000_000),
        "hard-sharing-bn": method([[0.8, 0.7, 0.6], [0.8, 0.7, 0.6]]),
        "random-4": method([[0.8, 0.8, UNKNOWN], [0.9, 0.8, 0.4]]),
        order: method(reached, order=learned),
    }
    analysis = OrderAnalysis(order, "hard", random, lost, 512, rerouting)
    about = job("multi <1> $x_{$", dict.fromkeys(names, 40), (0, 1))
    rates = {"linear": 1.0, "soft": 3.0}
    return MultitaskResults(about, names, np.array([20, 30, 40]), rates, methods, analysis)
