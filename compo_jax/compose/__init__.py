"""Modules into one model: arithmetic on task vectors, merge rules, and solves with the tasks' exact curvature.

`compose` for weights that are known, `merge` for a rule by its name: `compose.rules` says which to take.
"""

from compo_jax.compose.adaptive import Adapted as Adapted
from compo_jax.compose.adaptive import Unlabelled as Unlabelled
from compo_jax.compose.adaptive import adamerging as adamerging
from compo_jax.compose.arithmetic import compose as compose
from compo_jax.compose.arithmetic import task_arithmetic as task_arithmetic
from compo_jax.compose.arithmetic import task_vector as task_vector
from compo_jax.compose.checkpoints import merge_files as merge_files
from compo_jax.compose.competition import pcb as pcb
from compo_jax.compose.competition import sce as sce
from compo_jax.compose.fisher import fisher_merge as fisher_merge
from compo_jax.compose.group_weights import Weighed as Weighed
from compo_jax.compose.group_weights import group_landscape as group_landscape
from compo_jax.compose.group_weights import layer_weights as layer_weights
from compo_jax.compose.kronecker import kronecker_merge as kronecker_merge
from compo_jax.compose.kronecker import regmean as regmean
from compo_jax.compose.masks import Unified as Unified
from compo_jax.compose.masks import consensus as consensus
from compo_jax.compose.masks import emr as emr
from compo_jax.compose.masks import tall as tall
from compo_jax.compose.preconditioners import inverse_of_rows as inverse_of_rows
from compo_jax.compose.preconditioners import leading_rows as leading_rows
from compo_jax.compose.rules import RULES as RULES
from compo_jax.compose.rules import Rule as Rule
from compo_jax.compose.rules import dare as dare
from compo_jax.compose.rules import find_rule as find_rule
from compo_jax.compose.rules import lines as lines
from compo_jax.compose.rules import merge as merge
from compo_jax.compose.solve import Solution as Solution
from compo_jax.compose.solve import Solved as Solved
from compo_jax.compose.solve import conjugate_gradients as conjugate_gradients
from compo_jax.compose.solve import solve_merge as solve_merge
from compo_jax.compose.sparse import drop as drop
from compo_jax.compose.sparse import ties as ties
from compo_jax.compose.sparse import trim as trim
from compo_jax.compose.spectral import iso as iso
from compo_jax.compose.spectral import tsv as tsv
from compo_jax.compose.sphere import cosines as cosines
from compo_jax.compose.sphere import karcher_mean as karcher_mean
from compo_jax.compose.sphere import slerp as slerp
from compo_jax.compose.stock import model_stock as model_stock
from compo_jax.compose.subspace import Projected as Projected
from compo_jax.compose.subspace import epimer as epimer
from compo_jax.compose.tails import breadcrumbs as breadcrumbs
from compo_jax.compose.tails import della as della
