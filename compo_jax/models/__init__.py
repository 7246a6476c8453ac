"""Models in Flax Linen, and checkpoints that others trained."""

from compo_jax.models import prompts as prompts
from compo_jax.models.bases import backbone as backbone
from compo_jax.models.bases import embedded as embedded
from compo_jax.models.isometric import IsometricNet as IsometricNet
from compo_jax.models.pretrained import from_timm as from_timm
from compo_jax.models.pretrained import load as load
from compo_jax.models.pretrained import save as save
from compo_jax.models.pretrained import to_timm as to_timm
from compo_jax.models.vit import ViT as ViT
