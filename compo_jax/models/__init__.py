"""Models in Flax Linen, and checkpoints that others trained."""

from compo_jax.models import clip_text as clip_text
from compo_jax.models import prompts as prompts
from compo_jax.models import zero_shot as zero_shot
from compo_jax.models.bases import Backbone as Backbone
from compo_jax.models.bases import backbone as backbone
from compo_jax.models.bases import embedded as embedded
from compo_jax.models.descriptions import Pixels as Pixels
from compo_jax.models.isometric import IsometricNet as IsometricNet
from compo_jax.models.loading import load as load
from compo_jax.models.loading import save as save
from compo_jax.models.pretrained import from_augreg as from_augreg
from compo_jax.models.pretrained import from_hf as from_hf
from compo_jax.models.pretrained import from_openai_clip as from_openai_clip
from compo_jax.models.pretrained import from_timm as from_timm
from compo_jax.models.pretrained import to_augreg as to_augreg
from compo_jax.models.pretrained import to_hf as to_hf
from compo_jax.models.pretrained import to_openai_clip as to_openai_clip
from compo_jax.models.pretrained import to_timm as to_timm
from compo_jax.models.vit import ViT as ViT
