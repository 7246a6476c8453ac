"""Figures, tables and the page of a run.

`text`, `table`, `charts` and `page` are what reports are made of. Each other file is a report: a function from results
to a page, whose figures are functions decorated with `charts.styled`, and stand in a `Block` each.
"""

from compo_jax.report.adaptation import adaptation_page as adaptation_page
from compo_jax.report.adaptation import adaptation_table as adaptation_table
from compo_jax.report.curvature import curvature_page as curvature_page
from compo_jax.report.curvature import fisher_table as fisher_table
from compo_jax.report.curvature import forecast_table as forecast_table
from compo_jax.report.incremental import Sample as Sample
from compo_jax.report.incremental import incremental_page as incremental_page
from compo_jax.report.incremental import incremental_table as incremental_table
from compo_jax.report.merging import merging_page as merging_page
from compo_jax.report.merging import merging_tables as merging_tables
from compo_jax.report.multitask import multitask_page as multitask_page
from compo_jax.report.multitask import multitask_table as multitask_table
from compo_jax.report.page import Block as Block
from compo_jax.report.page import Page as Page
from compo_jax.report.page import Tile as Tile
from compo_jax.report.page import write_page as write_page
from compo_jax.report.reuse import reuse_page as reuse_page
from compo_jax.report.reuse import reuse_table as reuse_table
from compo_jax.report.table import Cell as Cell
from compo_jax.report.table import Table as Table
from compo_jax.report.transfer import transfer_page as transfer_page
from compo_jax.report.transfer import transfer_table as transfer_table
from compo_jax.report.unlearning import unlearning_page as unlearning_page
from compo_jax.report.unlearning import unlearning_tables as unlearning_tables
