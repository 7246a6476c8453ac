"""Small quadratic programmes, solved to the global minimum, convex or not."""

import warnings

import numpy as np
from jaxtyping import Float

Vector = Float[np.ndarray, " n"]


def minimise(
    gram: Float[np.ndarray, "rows columns"],
    slope: Vector,
    lower: Float[np.ndarray, " lower"],
    upper: Float[np.ndarray, " upper"],
    *,
    sum_to: float | None = None,
) -> Vector:
    """argmin of `slope·w + ½ wᵀ gram w` over `lower <= w <= upper`, and `sum(w) = sum_to` where it is given.

    A convex programme (eigenvalues down to -1e-6 of the scale are rounding) goes to SciPy's SLSQP. A Gram matrix of
    true curvature need not be positive, and then SLSQP would stop at any local minimum; but at the global one the KKT
    conditions make the objective linear in the weights and multipliers, and which bounds are active is a choice of 0 or
    1: a mixed-integer linear programme (Xia, Vera and Zuluaga, 2020, arXiv 1810.02307), which SciPy's HiGHS solves to
    the end, in seconds for 20 weights; where it takes longer than a minute it stops, with a warning, at the best that
    it has. Either way the KKT system of that active set is then solved to machine precision. A slope of a
    millionth of the curvature and below can escape HiGHS, and the value then is above the minimum by some 1e-7 of its
    largest term.

    ValueError where the numbers aren't finite, shapes don't fit, or nothing satisfies the bounds.
    """
    gram, slope = np.asarray(gram, np.float64), np.asarray(slope, np.float64)
    lower, upper = np.asarray(lower, np.float64), np.asarray(upper, np.float64)
    if not (np.all(np.isfinite(gram)) and np.all(np.isfinite(slope))):
        raise ValueError("a quadratic with numbers that aren't finite has no minimum: the loss may have overflowed")
    if not slope.size or gram.shape != (slope.size, slope.size) or not slope.shape == lower.shape == upper.shape:
        raise ValueError(
            f"a quadratic of n >= 1 weights has a gram (n, n) and n slopes and bounds; these are {gram.shape}, "
            f"{slope.shape}, {lower.shape} and {upper.shape}"
        )
    if not (np.all(np.isfinite(lower) & np.isfinite(upper)) and (sum_to is None or np.isfinite(sum_to))):
        raise ValueError(f"bounds and sum must be finite, not {lower} to {upper} with the sum {sum_to}")
    if sum_to is not None:
        slope = slope - slope.mean()  # what all share changes nothing under the sum, and would set the scale
    total, slack = 0.0 if sum_to is None else sum_to, 1e-12 * (np.abs(lower) + np.abs(upper)).sum()
    if np.any(lower > upper) or (sum_to is not None and not lower.sum() - slack <= total <= upper.sum() + slack):
        raise ValueError(f"no weights satisfy the bounds {lower} to {upper} with the sum {sum_to}: widen the bounds")
    reach = np.abs(gram) @ np.maximum(np.abs(lower), np.abs(upper)) + np.abs(slope)
    scale = reach.max() or 1.0
    gram, slope = (gram + gram.T) / 2 / scale, slope / scale
    values, vectors = np.linalg.eigh(gram)
    if values[0] >= -1e-6:  # a Gram matrix measured in float32 has eigenvalues below zero that are but rounding
        gram = gram if values[0] >= 0 else (vectors * np.maximum(values, 0)) @ vectors.T
        w = _convex(gram, slope, lower, upper, sum_to)
        if _is_minimum(gram, slope, lower, upper, w, sum_to):
            return w
    minima = [_polish(gram, slope, lower, upper, w, sum_to) for w in _global(gram, slope, lower, upper, sum_to)]
    return min(minima, key=lambda w: slope @ w + 0.5 * w @ gram @ w)


def _convex(gram, slope, lower, upper, sum_to) -> Vector:
    from scipy.optimize import LinearConstraint, minimize

    middle = np.clip(np.full(len(slope), (sum_to or 0) / len(slope)), lower, upper)
    result = minimize(
        lambda w: (slope @ w + 0.5 * w @ gram @ w, slope + gram @ w),
        middle,
        jac=True,
        method="SLSQP",
        bounds=list(zip(lower, upper, strict=True)),
        constraints=[] if sum_to is None else LinearConstraint(np.ones(len(slope)), sum_to, sum_to),
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    return _polish(gram, slope, lower, upper, np.clip(result.x, lower, upper), sum_to)


def _is_minimum(gram, slope, lower, upper, w, sum_to) -> bool:
    """The KKT conditions, which suffice where the programme is convex."""
    gradient = gram @ w + slope
    free = (w > lower) & (w < upper)
    if sum_to is not None:
        if abs(w.sum() - sum_to) > 1e-9:
            return False
        # Where every weight is at a bound, any level between those of the lower and the upper ones will do.
        gradient = gradient - (gradient[free].mean() if free.any() else gradient[w > lower].max(initial=-np.inf))
    return bool(
        np.all(np.abs(gradient[free]) < 1e-9)
        and np.all(gradient[(w <= lower) & (w < upper)] > -1e-9)
        and np.all(gradient[(w >= upper) & (w > lower)] < 1e-9)
    )


def _global(gram, slope, lower, upper, sum_to) -> list[Vector]:
    from scipy.optimize import LinearConstraint, milp

    n = len(slope)
    # Variables: w, m and v (multipliers of the lower and upper bounds), y and z (bound active: 1), s (of the sum).
    one, nil, width = np.eye(n), np.zeros((n, n)), np.diag(upper - lower)
    column = np.zeros((n, 1))
    summed = float(sum_to is not None)
    big = 1.0 + summed  # |gram w + slope| is at most 1 by the scaling, and so is the multiplier of the sum
    rows = [
        (np.hstack([gram, -one, one, nil, nil, column - summed]), -slope, -slope),
        (np.hstack([nil, one, nil, -big * one, nil, column]), -np.inf, 0),
        (np.hstack([nil, nil, one, nil, -big * one, column]), -np.inf, 0),
        (np.hstack([one, nil, nil, width, nil, column]), -np.inf, upper),
        (np.hstack([-one, nil, nil, nil, width, column]), -np.inf, -lower),
    ]
    target = 0.0 if sum_to is None else sum_to
    if sum_to is not None:
        rows.append((np.hstack([np.ones(n), np.zeros(4 * n + 1)])[None], target, target))
    programme = {
        # HiGHS takes differences of less than 1e-6 for none.
        "c": 1e4 * np.concatenate([slope, lower, -upper, np.zeros(2 * n), [target]]),
        "constraints": [LinearConstraint(*row) for row in rows],
        "bounds": (
            np.concatenate([lower, np.zeros(4 * n), [-summed]]),
            np.concatenate([upper, np.full(2 * n, big), np.ones(2 * n), [summed]]),
        ),
        "integrality": np.repeat([0, 0, 0, 1, 1, 0], [n, n, n, n, n, 1]),
    }
    # With its presolve HiGHS has lost a minimum where slopes were 1e-6; without, it has called a programme infeasible.
    options = {"mip_rel_gap": 0.0, "time_limit": 30.0}
    results = [milp(**programme, options=options | {"presolve": presolve}) for presolve in (True, False)]
    if all(result.x is None for result in results):
        raise RuntimeError("HiGHS found no weights though there are some: look at the Gram matrix for extreme numbers")
    if all(result.status == 1 for result in results):
        warnings.warn(
            f"the best of {n} weights were not proven so within a minute: the Gram matrix has negative eigenvalues, "
            "and such a programme takes a time that grows exponentially",
            stacklevel=4,
        )
    return [np.clip(result.x[:n], lower, upper) for result in results if result.x is not None]


def _polish(gram, slope, lower, upper, w, sum_to) -> Vector:
    """The best feasible KKT solution with the weights that are close to a bound put on it; `w` where there is none."""
    # A solver stops within some 1e-6 of a bound, and the minimum may itself lie that close to one: all readings count.
    readings = [_stationary(gram, slope, lower, upper, w, sum_to, near) for near in (1e-5, 1e-7, 1e-9)]
    readings = [x for x in readings if np.all(x >= lower) and np.all(x <= upper)]
    readings = [x for x in readings if sum_to is None or abs(x.sum() - sum_to) < 1e-12 * (1 + np.abs(x).sum())]
    return min(readings, key=lambda x: slope @ x + 0.5 * x @ gram @ x, default=w)


def _stationary(gram, slope, lower, upper, w, sum_to, near) -> Vector:
    """Solves the KKT system of the weights that are further than `near` (of the width) from both bounds."""
    summed, near = float(sum_to is not None), near * (upper - lower)
    exact = np.where(w - lower <= near, lower, np.where(upper - w <= near, upper, w))
    free = (exact > lower) & (exact < upper)
    if free.any():
        count = free.sum()
        matrix = np.zeros((count + 1, count + 1))
        matrix[:count, :count] = gram[np.ix_(free, free)]
        matrix[count, :count] = matrix[:count, count] = summed
        fixed = exact[~free]
        right = -slope[free] - gram[np.ix_(free, ~free)] @ fixed
        right = np.append(right, summed * ((sum_to or 0.0) - fixed.sum()))
        # From where we are: where the system is singular, the smallest step to a solution.
        step = np.linalg.lstsq(matrix, right - matrix @ np.append(exact[free], 0), rcond=1e-12)[0]
        exact[free] += step[:count]
    return exact
