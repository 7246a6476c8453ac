"""The page of adaptation by order to a domain without labels."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from compo_jax.report import adaptation_figures as figures
from compo_jax.report.adaptation_numbers import Found, cells, marked, mean_known, objective_text, read
from compo_jax.report.modular_numbers import net_text, paired_text, several
from compo_jax.report.numbers import Metrics, decimal, percent, signed, spread
from compo_jax.report.previous import block, html_table, write_page

UNLABELLED = [group for group in figures.GROUPS if group != "oracle"]


def _blocks(metrics: Metrics, found: Found) -> Iterator[str]:
    """The figures, each with what to look for in it."""
    targets = metrics["targets"]
    groups = {marked(name, method): method.group for name, method in found.methods.items()}
    accuracy = {marked(name, method): method.accuracy for name, method in found.methods.items()}
    yield block(
        figures.by_target(accuracy, groups, targets, found.baseline),
        f"Right of the dashed line a method beats {found.baseline}. Compare the order alone with batch normalisation "
        "(BN) alone, and both together with either: what the order adds is the gap between them. Each target "
        "has its own axis, and small marks are seeds; † was chosen by the target's labels: no method may be.",
    )
    correlation = found.correlation(UNLABELLED)
    routes = found.correlation(("sources", "order"))
    yield block(
        figures.objective(
            accuracy, {marked(name, m): m.objective for name, m in found.methods.items()}, groups, targets,
            mean_known(correlation, 0),
        ),
        "A mark is a method with one seed. The objective needs no label: where it can choose among methods, marks go "
        "from the top left to the bottom right, and their rank correlation ρ is near −1. Near 0 or above, a low "
        "objective tells nothing about accuracy.",
        html_table(
            ["rank correlation", *targets],
            [(label, [spread(one, 2) for one in values.T])
             for label, values in (("all that no label chose", correlation), ("sources and order alone", routes))],
        ),
    )  # fmt: skip
    known = np.isfinite(found.sources).any(1) | np.isfinite(found.own)
    named = [domain for domain, there in zip(metrics["domains"], known, strict=True) if there]
    yield block(
        figures.sources(found.sources[known], found.own[known], named, targets),
        "How far each source gets on a target as it is, beside its own test images: a dark column is a far target. "
        "Where rows differ much, the choice of the source matters. Mean over seeds.",
    )
    for target, parts in found.routes.items():
        if not parts.sources and not parts.adapted:
            continue
        yield block(
            figures.routes(target, parts.sources, parts.adapted),
            "Which block, counted from 0, each layer calls: sources call one, an adapted route may mix several. See "
            "which source the adapted ones resemble, and in which layers they leave all sources. "
            f"Seed {metrics['seeds'][0]}.",
        )


def adaptation(folder: str | os.PathLike, metrics: Metrics) -> Path:
    """Writes `folder/report.html`, the page of adaptation by order, and returns its path.

    Args:
      metrics: name, data, seeds, seconds, net, domains, targets (each left out in turn), classes, made (a sentence
        where domains are made by corrupting one set, or None), baseline (the method that others are held against),
        sources and source_accuracy (by seed, by target: accuracies of each source on the target, and on its own
        test images), and methods: of each accuracy and objective (nats) by seed and target, and its group, a key of
        `adaptation_figures.GROUPS`. Optionally routes and templates. Fractions; None is not known.

    Raises KeyError or ValueError where the metrics don't fit together.
    """
    found = read(metrics)
    seeds, targets = metrics["seeds"], metrics["targets"]
    made = f" {metrics['made'].rstrip('. ')}." if metrics["made"] else ""
    oracle = any(method.group == "oracle" for method in found.methods.values())
    lead = (
        f"{len(metrics['domains'])} domains of {metrics['data']} with {len(metrics['classes'])} classes; "
        f"{', '.join(targets)} left out of training{' in turn' * (len(targets) > 1)}, then adapted to without labels."
        f"{made[:2].upper()}{made[2:]} {metrics['net']['layers']} layers of {metrics['net']['templates']} templates, "
        f"{net_text(metrics['net'])}. A difference is to {found.baseline} on the same seed and target, mean ± standard "
        "error over such pairs (taken as independent), and the pairs won. The objective is lower where predictions "
        f"are surer and more varied.{several(seeds)}"
        + (" † was chosen by the target's labels, as no method may be." if oracle else "")
    )
    key_numbers = [(found.baseline, percent(float(found.methods[found.baseline].accuracy.mean())), "%")]
    for group, words in (("order", "order alone"), ("bn", "BN alone"), ("order+bn", "order and BN")):
        known = {
            name: float(method.objective.mean())
            for name, method in found.methods.items()
            if method.group == group and name != found.baseline
        }
        if known:
            name = min(known, key=lambda name: np.nan_to_num(known[name], nan=np.inf))
            key_numbers.append((f"{words}, lowest objective: {name}", signed(found.against(name).mean), "points"))
    every = mean_known(found.correlation(UNLABELLED), (0, 1))
    key_numbers += [
        ("rank correlation of objective and accuracy", decimal(float(every), 2), ""),
        (f"target{'s' * (len(targets) != 1)}, {len(seeds)} seed{'s' * (len(seeds) != 1)}", str(len(targets)), ""),
        ("whole job", decimal(metrics["seconds"], 0), "s"),
    ]
    headings = (
        "method (%)", "adapts", *targets, *["mean"] * (len(targets) > 1),
        f"difference to {found.baseline} (points)", "objective (nats)",
    )  # fmt: skip
    body = (
        (
            marked(name, method),
            [
                figures.GROUPS[method.group].label,
                *cells(method),
                "" if name == found.baseline else paired_text(found.against(name)),
                objective_text(method),
            ],
        )
        for name, method in found.methods.items()
    )
    return write_page(folder, metrics["name"], lead, key_numbers, html_table(headings, body), _blocks(metrics, found))
