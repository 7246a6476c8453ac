"""What a check of curvature measured, as types for `train.write_result` and `train.read_result`. Losses in nats."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class ProductCheck(NamedTuple):
    """Relative errors of Hessian products against the dense matrix in float64, for one leaf of `dimension` numbers.

    Attributes:
      error_float64, error_float32: of the exact product.
      asymmetry_of_dense: of that matrix, relative to its largest entry.
      difference_steps, difference_errors: of central differences of the gradient, by step size.
    """

    leaf: str
    dimension: int
    error_float64: float
    error_float32: float
    asymmetry_of_dense: float
    difference_steps: Float[np.ndarray, " steps"]
    difference_errors: Float[np.ndarray, " steps"]


class FisherEstimate(NamedTuple):
    """An estimate F of the Fisher at one batch size, against the exact Gauss-Newton matrix G, on task vectors τ.

    Attributes:
      seconds: of the estimate, compiled.
      trace_ratio, diagonal_cosine: of the diagonals.
      form_ratio, form_error: means over τ of τᵀFτ / τᵀGτ, and of its distance from 1.
      product_cosine: mean over τ of the cosine of Fτ and Gτ.
    """

    estimate: str
    batch: int
    seconds: float
    trace_ratio: float
    diagonal_cosine: float
    form_ratio: float
    form_error: float
    product_cosine: float


class FisherCheck(NamedTuple):
    """Estimates of the Fisher over so many images, classes and parameters."""

    images: int
    classes: int
    parameters: int
    rows: list[FisherEstimate]


class Expansion(NamedTuple):
    """The loss of compositions, foretold by a second-order expansion around one point.

    Attributes:
      forecast: of each composition.
      correlation, relative_error: with the true loss, and mean distance from it.
      standard_error: of the forecast, from the number of images; nan where it isn't known.
      remainder_loss, remainder_slope: that the regulariser makes up for.
      gram_eigenvalues: of the task vectors' Gram matrix in the Hessian.
      best_weights: with the lowest forecast; what is foretold there, and the truth.
      gain_error: standard error of how much lower the true loss is there than at uniform weights.
    """

    forecast: Float[np.ndarray, " compositions"]
    correlation: float
    relative_error: float
    standard_error: float | None
    remainder_loss: Float[np.ndarray, "..."]
    remainder_slope: Float[np.ndarray, "..."]
    gram_eigenvalues: Float[np.ndarray, " tasks"]
    best_weights: Float[np.ndarray, " tasks"]
    best_forecast: float
    best_true: float
    gain_error: float


class Theorem(NamedTuple):
    """Theorem 1 of Porrello et al. (2025) as the modules are scaled from nothing.

    Attributes:
      individual, composed: the mean loss of the single modules, and the loss of their composition.
      gap, measured_gap: what the theorem says that lies between them, and what does.
    """

    scale: Float[np.ndarray, " scales"]
    individual: Float[np.ndarray, " scales"]
    composed: Float[np.ndarray, " scales"]
    gap: Float[np.ndarray, " scales"]
    measured_gap: Float[np.ndarray, " scales"]


class ForecastCheck(NamedTuple):
    """Random compositions of a pool: their true losses, that at uniform weights, and their forecasts by anchor."""

    true: Float[np.ndarray, " compositions"]
    uniform_true: float
    anchors: dict[str, Expansion]
    theorem: Theorem


class SpectrumCheck(NamedTuple):
    """The spectrum of the Hessian at the base, over so many images and dimensions.

    Attributes:
      nodes, weights: of the quadrature: eigenvalues, and the share of the dimensions that each stands for.
      smallest, bound: eigenvalue, and how far it may be off.
      negative_mass: part of the absolute spectrum below zero.
    """

    images: int
    dimension: int
    nodes: Float[np.ndarray, " nodes"]
    weights: Float[np.ndarray, " nodes"]
    smallest: float
    bound: float
    largest: float
    negative_mass: float


class CurvatureResults(NamedTuple):
    """A check of curvature on the pools of one run, over so many test images; `forecast` is by pool."""

    name: str
    data: str
    backbone: str
    seed: int
    tasks: list[str]
    images: int
    products: ProductCheck
    fisher: FisherCheck
    forecast: dict[str, ForecastCheck]
    spectrum: SpectrumCheck
    seconds: float
