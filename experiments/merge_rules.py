"""The merge rules that experiments compare, and their options where they differ from the defaults.

Nothing here loads JAX, as of all options.
"""

RULES = [  # the names of compose.RULES in its order: a test compares them, as JAX isn't loaded yet
    "average", "task_arithmetic", "ties", "dare", "slerp", "karcher", "model_stock", "tsv", "iso", "fisher", "regmean",
    "kronecker", "ggn", "best_weights", "lines", "della", "breadcrumbs", "consensus", "tall", "emr", "pcb", "sce",
    "adamerging", "epimer", "layer_weights",
    "wudi", "iso_cts", "dc_merge", "cart", "knots", "core_space", "esm", "regmean_plus",
    "subspace_boosting",
]  # fmt: skip
A_TASK = ("tall", "emr")  # a model for each
BY_STEPS = ("adamerging", "layer_weights", "regmean_plus")  # with the images in hand, not one program
TAKEN = {"ggn": ("factors",)}  # what a rule can do without, and does better with
OPTIONS = {
    "dare": {"rate": 0.5},
    "regmean": {"scaling": 0.9},
    "kronecker": {"damping": 1e-3, "anchor": "average"},
    "ggn": {"damping": 1e-3, "anchor": "average", "max_iterations": 30, "tolerance": 1e-4},
    "epimer": {"damping": 1e-3, "groups": "tasks"},
    "adamerging": {"steps": 100},
    "knots": {"rule": "ties"},  # which goes by entries: the average, the default, and Iso are the same in any space
    "core_space": {"rule": "ties"},
}
