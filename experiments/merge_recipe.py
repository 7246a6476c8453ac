"""Checkpoint files merged by a recipe: `merging.py --recipe FILE --out FILE`."""

import time

from job import console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from compo_jax import compose


def merge(recipe, out, card=None) -> None:
    """Writes the checkpoint, and the model card where one is asked for, and prints what was done."""
    began, chosen = time.perf_counter(), compose.read_recipe(recipe)
    with Progress(BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        steps = compose.merge_recipe(
            chosen, out, card=card, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    for step in steps:
        console.print(str(step), highlight=False, markup=False, soft_wrap=True)
    seconds = time.perf_counter() - began
    console.print(f"{len(chosen.models)} checkpoints merged into {out} in {seconds:.1f} s", soft_wrap=True)
