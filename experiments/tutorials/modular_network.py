"""A network whose layers are mixtures of shared blocks: several tasks, each with its own order; then one more task.

python experiments/tutorials/modular_network.py                # 40 s on 2 CPU cores
"""

import jax
import jax.numpy as jnp
import numpy as np

from compo_jax import data, modular

# -- three scripts, four layers, four blocks ---------------------------------------------------------------------------
stream = data.open_tasks(["glyphs"], size=16, tasks=4, images=50)
*tasks, new = stream.tasks
net = modular.ModularNet(tuple(len(task.classes) for task in tasks), layers=4, templates=4, width=16)
variables = net.init(jax.random.key(0), jnp.zeros((3, 1, 16, 16, 3)))
learner = modular.learner(net, stream.prepare, modular.Settings(steps=200, learning_rate=3e-3))
trained, _ = learner.train(variables, [task.train for task in tasks], seed=0)
network = modular.Network(net, trained)
accuracy = modular.accuracies(net, stream.prepare)(trained, [task.test for task in tasks])
print("accuracy of each task:", np.round(accuracy, 2))

# -- what each task's order is -----------------------------------------------------------------------------------------
print("the part of each template in the second layer of each task:")
print(np.round(modular.routes.shares(trained["params"]["route"])[:, 1], 2))

# -- one task as an ordinary ResNet, with nothing modular left in it ---------------------------------------------------
resnet, weights = modular.plain(network, task=0)
images = stream.prepare(jnp.asarray(tasks[0].test.images(np.arange(4))))
print("the ResNet of task 0 answers:", resnet.apply(weights, images).argmax(-1))

# -- a fourth task: its head and its order alone are new, the blocks stay to the bit -----------------------------------
one, begun = modular.new_task(network, jax.random.key(1), classes=len(new.classes))
learner = modular.transfer(one, stream.prepare, modular.Settings(steps=100, learning_rate=1e-2), "head+route")
measure = modular.accuracies(one, stream.prepare)
before, after = (measure(variables, [new.test])[0] for variables in (begun, learner.train(begun, [new.train], 0)[0]))
print(f"the new task before and after: {before:.2f}, {after:.2f}")
