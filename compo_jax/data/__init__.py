"""Streams of tasks (glyphs, TFDS sets, folders, arrays), batches that are addressable by step, augmentation in JAX."""

from compo_jax.data import augment as augment
from compo_jax.data import corruptions as corruptions
from compo_jax.data import glyphs as glyphs

from .batches import eval_batches as eval_batches
from .batches import steps_per_epoch as steps_per_epoch
from .batches import train_batches as train_batches
from .domains import corrupted_domains as corrupted_domains
from .folders import folder_stream as folder_stream
from .named import open_domains as open_domains
from .named import open_stream as open_stream
from .named import open_tasks as open_tasks
from .sources import tfds_stream as tfds_stream
from .splits import ArraySplit as ArraySplit
from .splits import JoinedSplit as JoinedSplit
from .splits import Split as Split
from .splits import SubsetSplit as SubsetSplit
from .stream import Task as Task
from .stream import TaskStream as TaskStream
from .stream import array_stream as array_stream
from .stream import glyph_stream as glyph_stream
from .stream import glyph_task as glyph_task
from .stream import pooled as pooled
from .stream import validation as validation
