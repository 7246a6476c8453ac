"""A merge of files holds a leaf of each checkpoint at a time, however many leaves there are."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from compo_jax.compose import merge

SIDE, TASKS, LEAVES = 700, 2, 20  # leaves of 2 MB, checkpoints of 40 MB
LEAF = 4 * SIDE**2
CODE = """
import json, resource, sys
import jax
from compo_jax.compose import merge_files, merge_recipe, read_recipe

folder = sys.argv[1]

def run(size):
    files = [f"{folder}/{size}-{t}.safetensors" for t in range(3)]
    for rule, options in (("average", {}), ("ties", {}), ("dare", {"key": jax.random.key(0)})):
        merge_files(rule, files[1:], f"{folder}/out", base=files[0], **options)
    merge_recipe(read_recipe(f"{folder}/{size}.yaml"), f"{folder}/out")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

print(json.dumps([run(size) for size in ("tiny", "one", "many")]))
"""
RECIPE = """
base_model: {size}-0.safetensors
models: [{{model: {size}-1.safetensors}}, {{model: {size}-2.safetensors}}]
merge_method: breadcrumbs_ties
parameters: {{weight: 0.5, density: 0.5}}
dtype: bfloat16
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts in kilobytes, as Linux does")
def test_the_peak_does_not_grow_with_the_number_of_leaves(tmp_path):
    for size, side, leaves in (("tiny", 8, 1), ("one", SIDE, 1), ("many", SIDE, LEAVES)):
        draw = np.random.default_rng(0)
        for t in range(TASKS + 1):
            arrays = {str(i): draw.random((side, side), np.float32) for i in range(leaves)}
            save_file(arrays, tmp_path / f"{size}-{t}.safetensors")
        (tmp_path / f"{size}.yaml").write_text(RECIPE.format(size=size))
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path)], env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    tiny, one, many = json.loads(done.stdout)
    assert many - tiny < 3 * LEAF * TASKS + 200e6
    assert many - one < LEAVES * LEAF / 2  # which is half a checkpoint


@pytest.mark.parametrize("shape", [(256, 1024), (1024, 256)])
@pytest.mark.parametrize(
    "rule, most", [("iso", 3), ("tsv", 3), ("iso_cts", 3), ("dc_merge", 3), ("cart", 3), ("wudi", 6)]
)
def test_decompositions_of_one_task_after_another_are_not_all_kept(rule, most, shape):
    """As XLA counts: the matrices as they come, stacked, and little beside; WUDI has a QR of all of them."""
    base, deltas = jnp.zeros(shape), [jax.ShapeDtypeStruct(shape, jnp.float32)] * 8
    compiled = jax.jit(lambda *deltas: merge(rule, {"w": base}, [{"w": x} for x in deltas])).lower(*deltas).compile()
    count = compiled.memory_analysis()
    assert count.argument_size_in_bytes + count.temp_size_in_bytes < most * len(deltas) * base.nbytes
