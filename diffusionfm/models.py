"""Our networks as diffusers models, which load, save, compile by blocks and take adapters as diffusers' own do.

The networks stand in `transformer` and `autoencoder`, whose names these classes bear: to draw, neither needs diffusers,
whose import takes longer than the drawing.
"""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin

from diffusionfm.autoencoder import AutoencoderNetwork
from diffusionfm.transformer import TransformerNetwork


class DiffusionTransformer(TransformerNetwork, ModelMixin, ConfigMixin, PeftAdapterMixin):
    __doc__ = TransformerNetwork.__doc__
    __module__ = TransformerNetwork.__module__
    device: torch.device
    dtype: torch.dtype
    __init__ = register_to_config(TransformerNetwork.__init__)


class AutoencoderKL(AutoencoderNetwork, ModelMixin, ConfigMixin):
    __doc__ = AutoencoderNetwork.__doc__
    __module__ = AutoencoderNetwork.__module__
    device: torch.device
    dtype: torch.dtype
    __init__ = register_to_config(AutoencoderNetwork.__init__)
