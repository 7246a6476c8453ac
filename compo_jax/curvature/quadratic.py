"""Small quadratic programmes, solved to the global minimum, convex or not."""

import numpy as np
from jaxtyping import Float
from scipy.optimize import LinearConstraint, milp, minimize

Vector = Float[np.ndarray, " n"]


def minimise(
    gram: Float[np.ndarray, "n n"], slope: Vector, lower: Vector, upper: Vector, *, sum_to: float | None = None
) -> Vector:
    """argmin of `slope·w + ½ wᵀ gram w` over `lower <= w <= upper`, and `sum(w) = sum_to` where it is given.

    A convex programme goes to SciPy's SLSQP. A Gram matrix of true curvature need not be positive, and then SLSQP would
    stop at any local minimum; but at the global one the KKT conditions make the objective linear in the weights and
    multipliers, and which bounds are active is a choice of 0 or 1: a mixed-integer linear programme (Xia, Vera and
    Zuluaga, 2020, arXiv 1810.02307), which SciPy's HiGHS solves to the end, in seconds for 20 weights. Either way the
    KKT system of the active set that was found is then solved to machine precision.
    """
    gram, slope = np.asarray(gram, np.float64), np.asarray(slope, np.float64)
    lower, upper = np.asarray(lower, np.float64), np.asarray(upper, np.float64)
    reach = np.abs(gram) @ np.maximum(np.abs(lower), np.abs(upper)) + np.abs(slope)
    scale = reach.max() or 1.0
    gram, slope = (gram + gram.T) / 2 / scale, slope / scale
    if np.linalg.eigvalsh(gram)[0] >= -1e-12:
        w = _convex(gram, slope, lower, upper, sum_to)
        if _is_minimum(gram, slope, lower, upper, w, sum_to):
            return w
    w = _global(gram, slope, lower, upper, sum_to)
    return _polish(gram, slope, lower, upper, w, sum_to)


def _convex(gram, slope, lower, upper, sum_to) -> Vector:
    middle = np.clip(np.full(len(slope), (sum_to or 0) / len(slope)), lower, upper)
    found = minimize(
        lambda w: (slope @ w + 0.5 * w @ gram @ w, slope + gram @ w),
        middle,
        jac=True,
        method="SLSQP",
        bounds=list(zip(lower, upper, strict=True)),
        constraints=[] if sum_to is None else LinearConstraint(np.ones(len(slope)), sum_to, sum_to),
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    return _polish(gram, slope, lower, upper, np.clip(found.x, lower, upper), sum_to)


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
        and np.all(gradient[w <= lower] > -1e-9)
        and np.all(gradient[(w >= upper) & (w > lower)] < 1e-9)
    )


def _global(gram, slope, lower, upper, sum_to) -> Vector:
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
    found = milp(
        np.concatenate([slope, lower, -upper, np.zeros(2 * n), [target]]),
        constraints=[LinearConstraint(*row) for row in rows],
        bounds=(
            np.concatenate([lower, np.zeros(4 * n), [-summed]]),
            np.concatenate([upper, np.full(2 * n, big), np.ones(2 * n), [summed]]),
        ),
        integrality=np.repeat([0, 0, 0, 1, 1, 0], [n, n, n, n, n, 1]),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise ValueError(f"no weights satisfy the bounds {lower} to {upper} with the sum {sum_to}: {found.message}")
    return np.clip(found.x[:n], lower, upper)


def _polish(gram, slope, lower, upper, w, sum_to) -> Vector:
    """Solves the KKT system of the weights that are at no bound; keeps `w` where that is no better."""
    summed, target = float(sum_to is not None), sum_to or 0.0
    near = 1e-5 * np.maximum(upper - lower, 1e-300)
    exact = np.where(w - lower < near, lower, np.where(upper - w < near, upper, w))
    free = (exact > lower) & (exact < upper)
    if free.any():
        count = free.sum()
        matrix = np.zeros((count + 1, count + 1))
        matrix[:count, :count] = gram[np.ix_(free, free)]
        matrix[count, :count] = matrix[:count, count] = summed
        fixed = exact[~free]
        right = np.append(-slope[free] - gram[np.ix_(free, ~free)] @ fixed, summed * (target - fixed.sum()))
        # From where we are: where the system is singular, the smallest step to a solution.
        step = np.linalg.lstsq(matrix, right - matrix @ np.append(exact[free], 0), rcond=1e-12)[0]
        exact[free] += step[:count]
    inside = np.all(exact >= lower) and np.all(exact <= upper) and (not summed or abs(exact.sum() - target) < 1e-9)

    def value(w):
        return slope @ w + 0.5 * w @ gram @ w

    return exact if inside and value(exact) <= value(w) + 1e-9 else w
