"""Ways to learn that others are measured against, a file each: what lies in this folder is registered."""

import importlib
import pkgutil

from compo_jax.incremental.baselines.ncm import nearest_class_mean as nearest_class_mean
from compo_jax.incremental.baselines.ranpac import random_projection as random_projection

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")
