"""Training: one pure step, runners for any number of devices, a loop that can be killed and resumed."""

from compo_jax.train.checkpoints import Checkpoints as Checkpoints
from compo_jax.train.log import Log as Log
from compo_jax.train.loop import fit as fit
from compo_jax.train.loop import progress_bar as progress_bar
from compo_jax.train.results import read_result as read_result
from compo_jax.train.results import write_result as write_result
from compo_jax.train.run import Run as Run
from compo_jax.train.run import once as once
from compo_jax.train.run import open_run as open_run
from compo_jax.train.run import read_json as read_json
from compo_jax.train.run import write_json as write_json
from compo_jax.train.runners import RUNNERS as RUNNERS
from compo_jax.train.runners import Runner as Runner
from compo_jax.train.runners import jit_runner as jit_runner
from compo_jax.train.runners import pmap_runner as pmap_runner
from compo_jax.train.step import TrainState as TrainState
from compo_jax.train.step import init_state as init_state
from compo_jax.train.step import make_step as make_step
