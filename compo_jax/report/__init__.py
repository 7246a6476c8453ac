"""Figures, tables and the page of a run."""

from compo_jax.report.adaptation import adaptation_page as adaptation_page
from compo_jax.report.adaptation import adaptation_table as adaptation_table
from compo_jax.report.multitask import multitask_page as multitask_page
from compo_jax.report.multitask import multitask_table as multitask_table
from compo_jax.report.reuse import reuse_page as reuse_page
from compo_jax.report.reuse import reuse_table as reuse_table
from compo_jax.report.transfer import transfer_page as transfer_page
from compo_jax.report.transfer import transfer_table as transfer_table
