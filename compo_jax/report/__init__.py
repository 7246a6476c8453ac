"""Figures, tables and the page of a run."""

from compo_jax.report import curvature_figures as curvature_figures
from compo_jax.report import figures as figures
from compo_jax.report import merging_figures as merging_figures
from compo_jax.report import multitask_figures as multitask_figures
from compo_jax.report import route_figures as route_figures
from compo_jax.report import unlearning_figures as unlearning_figures
from compo_jax.report.curvature import curvature as curvature
from compo_jax.report.curvature import fisher_table as fisher_table
from compo_jax.report.curvature import forecast_table as forecast_table
from compo_jax.report.merging import merging as merging
from compo_jax.report.merging_numbers import merging_table as merging_table
from compo_jax.report.multitask import multitask as multitask
from compo_jax.report.multitask_numbers import multitask_table as multitask_table
from compo_jax.report.numbers import Row as Row
from compo_jax.report.numbers import rows as rows
from compo_jax.report.numbers import table as table
from compo_jax.report.page import incremental as incremental
from compo_jax.report.unlearning import unlearning as unlearning
from compo_jax.report.unlearning import unlearning_table as unlearning_table
