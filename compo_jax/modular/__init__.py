"""Modular networks: blocks shared by tasks as templates, and a learned order for each task.

Built from the public abstract of Zhmoginov, Bashkirova and Sandler, "Compositional Models: Multi-Task Learning and
Knowledge Transfer with Modular Networks" (2021, arXiv 2107.10963); what that does not fix is our choice.
"""

from compo_jax.modular import analysis as analysis
from compo_jax.modular import comparison as comparison
from compo_jax.modular import experts as experts
from compo_jax.modular import results as results
from compo_jax.modular import routes as routes
from compo_jax.modular.batches import balanced_batches as balanced_batches
from compo_jax.modular.batches import balanced_eval as balanced_eval
from compo_jax.modular.bridge import route_landscape as route_landscape
from compo_jax.modular.cost import macs as macs
from compo_jax.modular.cost import parameters as parameters
from compo_jax.modular.edit import add_layer as add_layer
from compo_jax.modular.edit import add_task as add_task
from compo_jax.modular.edit import add_templates as add_templates
from compo_jax.modular.edit import harden as harden
from compo_jax.modular.edit import new_task as new_task
from compo_jax.modular.edit import remove_template as remove_template
from compo_jax.modular.edit import set_route as set_route
from compo_jax.modular.edit import take_layers as take_layers
from compo_jax.modular.edit import take_tasks as take_tasks
from compo_jax.modular.evaluate import Gap as Gap
from compo_jax.modular.evaluate import accuracies as accuracies
from compo_jax.modular.evaluate import predictions as predictions
from compo_jax.modular.evaluate import statistics as statistics
from compo_jax.modular.expert_net import ExpertNet as ExpertNet
from compo_jax.modular.expert_net import expert_macs as expert_macs
from compo_jax.modular.export import plain as plain
from compo_jax.modular.forecast import rerouting as rerouting
from compo_jax.modular.losses import objective as objective
from compo_jax.modular.mixing import mix_templates as mix_templates
from compo_jax.modular.net import ModularNet as ModularNet
from compo_jax.modular.net import Network as Network
from compo_jax.modular.net import Route as Route
from compo_jax.modular.newton import NewtonStep as NewtonStep
from compo_jax.modular.newton import newton_route as newton_route
from compo_jax.modular.parts import PARTS as PARTS
from compo_jax.modular.parts import nearest_source as nearest_source
from compo_jax.modular.parts import transfer as transfer
from compo_jax.modular.random_routes import beside_random as beside_random
from compo_jax.modular.routes import gumbel as gumbel
from compo_jax.modular.routes import hard as hard
from compo_jax.modular.routes import linear as linear
from compo_jax.modular.routes import soft as soft
from compo_jax.modular.routes import straight_through as straight_through
from compo_jax.modular.settings import Settings as Settings
from compo_jax.modular.settings import learned_temperature as learned_temperature
from compo_jax.modular.settings import phase as phase
from compo_jax.modular.storage import load_task as load_task
from compo_jax.modular.storage import load_templates as load_templates
from compo_jax.modular.storage import save_task as save_task
from compo_jax.modular.storage import save_templates as save_templates
from compo_jax.modular.training import FIXED_ORDER as FIXED_ORDER
from compo_jax.modular.training import Learner as Learner
from compo_jax.modular.training import Trained as Trained
from compo_jax.modular.training import learner as learner
from compo_jax.modular.unlabelled import MIXTURES as MIXTURES
from compo_jax.modular.unlabelled import adaptation as adaptation
from compo_jax.modular.unlabelled import information_maximisation as information_maximisation
from compo_jax.modular.unlabelled import mean_source as mean_source
from compo_jax.modular.unlabelled import one_source as one_source
from compo_jax.modular.unlabelled import soup_of_sources as soup_of_sources
from compo_jax.modular.unlabelled import source_objectives as source_objectives
from compo_jax.modular.updates import optimizer as optimizer
