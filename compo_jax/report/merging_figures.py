"""The figures of a comparison of merge rules: pure functions from numbers to a matplotlib `Figure`, as in `figures`."""

from collections.abc import Collection, Mapping, Sequence

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from compo_jax.report.figures import ANNOTATED, COLOURS, INK, STYLE, middle, name_ticks, titled_figure
from compo_jax.report.merging_numbers import DAGGER, Runs

MARKERS = "osD^vP"


def marked(rule: str, told: Collection[str]) -> str:
    """The rule's name, with a dagger where it is among those that have something to tell; cut to 24 letters."""
    return middle(rule, 24) + DAGGER * (rule in told)


def named_legend(figure: Figure, handles: Sequence[Line2D], names: Sequence[str], ncols: int) -> None:
    """A legend below the figure that shows names as they are, those with "$" or a leading "_" too."""
    legend = figure.legend(handles, ["name"] * len(names), loc="outside lower left", ncols=ncols)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(middle(name, 30))


def _time_axis(axes: Axes, seconds: np.ndarray) -> None:
    """A logarithmic axis in plain numbers, with 2 and 5 beside the decades where it has few of them."""
    axes.set_xscale("log")
    few = len(seconds) > 0 and seconds.max() < 100 * seconds.min()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=8))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.set_xlabel("time (s)")


@mpl.rc_context(STYLE)
def normalised(found: Mapping[str, Mapping[str, Runs]], base: Mapping[str, Runs], told: Collection[str] = ()) -> Figure:
    """Normalised accuracy of each rule, the best on top: small dots are runs, a large one is a pool's mean over them.

    Args:
      found: of each pool, of each rule: a number for each run, nan where it isn't known.
      base: the same number for the base without a module, of each pool; dotted, in the pool's colour.
      told: rules to mark with a dagger.
    """
    rules = list(dict.fromkeys(rule for values in found.values() for rule in values))
    means = {rule: [np.mean(values[rule]) for values in found.values() if rule in values] for rule in rules}
    order = {rule: np.mean([x for x in own if np.isfinite(x)] or [-np.inf]) for rule, own in means.items()}
    rules.sort(key=lambda rule: -order[rule])
    figure = titled_figure("Normalised accuracy of the rules", 1.7 + len(rules) * (0.16 + 0.09 * len(found)))
    axes = figure.add_subplot()
    axes.axvline(100, color=INK, linestyle="--", linewidth=1)
    for i, (pool, values) in enumerate(found.items()):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        shift = 0.64 * ((i + 0.5) / len(found) - 0.5)
        known = [rule for rule in rules if rule in values]
        rows = np.array([rules.index(rule) for rule in known]) + shift
        single = np.array([values[rule] for rule in known])
        axes.axvline(100 * np.mean(base[pool]), color=colour, linestyle=":", linewidth=1.4)
        if single.shape[1] > 1:
            axes.plot(
                100 * single.ravel(), np.repeat(rows, single.shape[1]), marker, color=colour, alpha=0.45, markersize=3,
                markeredgewidth=0, label=f"runs {i}",
            )  # fmt: skip
        axes.plot(
            100 * single.mean(1), rows, marker, color=colour, markersize=6.5, markeredgecolor=INK, markeredgewidth=0.6,
            label=f"mean {i}",
        )  # fmt: skip
    name_ticks(axes, "y", [marked(rule, told) for rule in rules], length=26)
    axes.set(xlabel="normalised accuracy (%)", ylim=(len(rules) - 0.4, -0.6))
    axes.tick_params(axis="y", length=0)
    axes.set_yticks(np.arange(len(rules) - 1) + 0.5, minor=True)
    axes.tick_params(axis="y", which="minor", length=0)
    axes.grid(axis="x")
    axes.grid(axis="y", which="minor")
    handles = [line for line in axes.lines if line.get_label().startswith("mean")]
    style = {"color": INK, "linewidth": 1.2}
    handles += [Line2D([], [], linestyle=line, **style) for line in ("--", ":")]
    named_legend(figure, handles, [*found, "each module alone", "the base, without a module"], 2)
    return figure


@mpl.rc_context(STYLE)
def over_time(
    pool: str, found: Mapping[str, tuple[float, float]], alone: float, told: Collection[str] = (), look: int = 0
) -> Figure:
    """Accuracy of each rule over its seconds, named at the right; dashed, the modules alone.

    Args:
      found: of each rule, seconds and accuracy, means over runs. What isn't known is left out.
      alone: the accuracy of the pool's modules, each on its own task.
      look: which colour and marker, by the pool's place in `normalised`.
    """
    from scipy.optimize import isotonic_regression

    figure = titled_figure(f"Accuracy over the rule's time, {middle(pool, 30)}", max(2.6, 1 + 0.165 * len(found)))
    axes = figure.add_subplot()
    known = [(rule, x, 100 * y) for rule, (x, y) in found.items() if x > 0 and np.isfinite(y)]
    known.sort(key=lambda one: one[2])
    x, y = np.array([one[1:] for one in known]).reshape(-1, 2).T
    _time_axis(axes, x)
    axes.plot(
        x, y, MARKERS[look % len(MARKERS)], color=COLOURS[look % len(COLOURS)], markersize=6, markeredgecolor=INK,
        markeredgewidth=0.6,
    )  # fmt: skip
    axes.set_ylabel("accuracy, task known (%)")
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid()
    shown = np.append(y, 100 * alone)
    shown = shown[np.isfinite(shown)] if np.isfinite(shown).any() else np.array([0.0, 100.0])
    low, high = shown.min(), shown.max()
    margin = 0.06 * (high - low) or 1.0
    axes.set_ylim(low - margin, high + margin)
    axes.axhline(100 * alone, color=INK, linestyle="--", linewidth=1)
    axes.annotate(
        "each module alone", (0, 100 * alone), (4, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
        fontsize=8,
    )  # fmt: skip
    if not known:
        return figure
    axes.set_xlim(x.min() / 2, x.max() * 2)
    # in fractions of the axes: the least shift that keeps a line of text between names, and all beside the axes
    heights = (y - low + margin) / (high - low + 2 * margin)
    steps = np.arange(len(y)) * min(0.085, 1 / len(y))
    places = np.clip(isotonic_regression(heights - steps).x, 0.02, 0.98 - steps[-1]) + steps
    for (rule, *point), place in zip(known, places, strict=True):
        axes.annotate(
            marked(rule, told),
            point,
            (1.06, place),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            parse_math=False,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": INK, "alpha": 0.45, "linewidth": 0.6, "relpos": (0, 0.5), "shrinkA": 1,
                "shrinkB": 3,
            },
        )  # fmt: skip
    return figure


@mpl.rc_context(STYLE)
def by_task(
    pool: str,
    values: Float[np.ndarray, "rules tasks"],
    rules: Sequence[str],
    tasks: Sequence[str],
    limits: tuple[float, float],
) -> Figure:
    """Heat map of fractions in %, a row for each rule and a column for each task; the colours span `limits` (%)."""
    figure = titled_figure(f"Normalised accuracy by task, {middle(pool, 30)}", 1.6 + 0.24 * len(rules))
    axes = figure.add_subplot()
    low, high = limits
    image = axes.imshow(100 * values, cmap="viridis", vmin=low, vmax=high, interpolation="nearest", aspect="auto")
    name_ticks(axes, "x", tasks)
    name_ticks(axes, "y", rules, length=26)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, label="normalised accuracy (%)", ticks=MaxNLocator(6, integer=True))
    bar.outline.set_visible(False)
    if len(tasks) <= ANNOTATED:
        for row, column in np.argwhere(np.isfinite(values)):
            luminance = np.dot(image.to_rgba(image.get_array()[row, column])[:3], (0.299, 0.587, 0.114))
            axes.text(
                column, row, f"{100 * values[row, column]:.0f}", ha="center", va="center", fontsize=7.5,
                color="black" if luminance > 0.5 else "white",
            )  # fmt: skip
    return figure
