"""Exact curvature of any function of any pytree of arrays, whatever the framework.

Every kind answers the same questions: `Curvature`, whose docstring says which kind to take. One product with a vector:
`hvp`, `ggnvp`. The loss of every composition of some modules: `landscape`; of any other model: `forecast`.
"""

from compo_jax.curvature.directional import Forecast as Forecast
from compo_jax.curvature.directional import forecast as forecast
from compo_jax.curvature.fisher import FisherDiagonal as FisherDiagonal
from compo_jax.curvature.fisher import as_curvature as as_curvature
from compo_jax.curvature.fisher import fisher_diagonal as fisher_diagonal
from compo_jax.curvature.fisher import summed_diagonal as summed_diagonal
from compo_jax.curvature.jacobian import factors_of_others as factors_of_others
from compo_jax.curvature.jacobian import jacobian_factors as jacobian_factors
from compo_jax.curvature.kfac import Eigen as Eigen
from compo_jax.curvature.kfac import Kronecker as Kronecker
from compo_jax.curvature.kfac import eigenvalue_corrected as eigenvalue_corrected
from compo_jax.curvature.kfac import kronecker as kronecker
from compo_jax.curvature.kfac import merge_kronecker as merge_kronecker
from compo_jax.curvature.lanczos import density as density
from compo_jax.curvature.lanczos import diagonal as diagonal
from compo_jax.curvature.lanczos import frobenius_norm as frobenius_norm
from compo_jax.curvature.lanczos import spectrum as spectrum
from compo_jax.curvature.lanczos import top_eigenvalues as top_eigenvalues
from compo_jax.curvature.lanczos import trace as trace
from compo_jax.curvature.output_loss import OutputLoss as OutputLoss
from compo_jax.curvature.output_loss import bernoulli_loss as bernoulli_loss
from compo_jax.curvature.output_loss import softmax_loss as softmax_loss
from compo_jax.curvature.output_loss import squared_loss as squared_loss
from compo_jax.curvature.products import Operator as Operator
from compo_jax.curvature.products import ggn as ggn
from compo_jax.curvature.products import ggnvp as ggnvp
from compo_jax.curvature.products import hessian as hessian
from compo_jax.curvature.products import hvp as hvp
from compo_jax.curvature.protocol import Curvature as Curvature
from compo_jax.curvature.protocol import Solvable as Solvable
from compo_jax.curvature.protocol import as_lineax as as_lineax
from compo_jax.curvature.stored import KINDS as KINDS
from compo_jax.curvature.stored import Packed as Packed
from compo_jax.curvature.stored import pack as pack
from compo_jax.curvature.stored import unpack as unpack
from compo_jax.curvature.taylor import Landscape as Landscape
from compo_jax.curvature.taylor import Remainder as Remainder
from compo_jax.curvature.taylor import landscape as landscape
from compo_jax.curvature.taylor import mix as mix
