"""The convolutional U-Nets that the paper compares with, built on diffusers' networks: LDM's (Appendix C) and ADM's
(Appendix F).

Their inputs and outputs are those of `UViT`, so the same trainer and samplers run them.
"""

import torch.nn as nn
from torch import Tensor

from uvit_fast.model.inputs import check_inputs, labels_in_range
from uvit_fast.runtime.extras import missing

LDM_HEADS = 8  # per attention layer
ADM_HEAD_DIM = 64  # as in ADM's ImageNet models


class UNet(nn.Module):
    """The noise prediction network eps(x_t, t, c), convolutional.

    "ldm" is conditioned on text by cross-attention (`UNet2DConditionModel`). "adm" is conditioned on classes, or on
    nothing, by a scale and shift after its normalisations, and resamples in residual blocks (`UNet2DModel`); its time
    embedding is as wide as the first level, twice ADM's.

    Args:
        unet: "ldm" or "adm".
        img_size, in_chans: height = width and channels of the input.
        channels: of each level, from full resolution down; each level halves the resolution.
        layers: residual blocks per level on the way down; one more on the way up.
        attention: for each level, whether attention follows its residual blocks.
        num_classes, context_dim, context_tokens: the condition, as in `UViT`.
        activation_checkpointing: "none", or "block": the backward recomputes residual and attention blocks.

    Raises:
        ImportError: diffusers is not installed; the message names the extra.
    """

    def __init__(
        self,
        unet: str,
        img_size: int,
        in_chans: int,
        channels: tuple[int, ...],
        layers: int,
        attention: tuple[bool, ...],
        num_classes: int = 0,
        context_dim: int = 0,
        context_tokens: int = 77,
        activation_checkpointing: str = "none",
    ):
        super().__init__()
        try:
            from diffusers import UNet2DConditionModel, UNet2DModel
        except ImportError:
            raise missing("model.unet", "diffusers", "diffusers") from None
        self.in_chans, self.num_classes, self.context_dim = in_chans, num_classes, context_dim
        self.text = (context_tokens, context_dim) if context_dim else None
        attend, plain = {"ldm": ("CrossAttn{}2D", "{}2D"), "adm": ("Attn{}2D", "{}2D")}[unet]
        down = [(attend if has else plain).format("DownBlock") for has in attention]
        up = [(attend if has else plain).format("UpBlock") for has in reversed(attention)]
        shape = {
            "sample_size": img_size,
            "in_channels": in_chans,
            "out_channels": in_chans,
            "block_out_channels": channels,
            "layers_per_block": layers,
            "down_block_types": down,
            "up_block_types": up,
        }
        if unet == "ldm":
            self.net = UNet2DConditionModel(**shape, cross_attention_dim=context_dim, attention_head_dim=LDM_HEADS)
        else:
            self.net = UNet2DModel(
                **shape,
                attention_head_dim=ADM_HEAD_DIM,
                resnet_time_scale_shift="scale_shift",
                downsample_type="resnet",
                upsample_type="resnet",
                time_embedding_dim=2 * channels[0],  # 4 x ADM's model channels; the first level has twice those
                num_class_embeds=num_classes or None,
            )
        self.reset_parameters()
        if activation_checkpointing == "block":
            self.net.enable_gradient_checkpointing()

    def reset_parameters(self) -> None:
        """Zero the last layer of each residual branch and the output convolution, as ADM and LDM do; the others keep
        PyTorch's initialisation.
        """
        from diffusers.models.attention_processor import Attention
        from diffusers.models.resnet import ResnetBlock2D
        from diffusers.models.transformers.transformer_2d import Transformer2DModel

        ends = [self.net.conv_out]
        for module in self.net.modules():
            if isinstance(module, ResnetBlock2D):
                ends.append(module.conv2)
            elif isinstance(module, Transformer2DModel):
                ends.append(module.proj_out)
            elif isinstance(module, Attention) and module.residual_connection:  # outside a Transformer2DModel
                ends.append(module.to_out[0])
        for end in ends:
            nn.init.zeros_(end.weight)
            nn.init.zeros_(end.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """Predict the noise; arguments and result as for `UViT`.

        Raises:
            ValueError: as in `UViT.forward`; height and width may be any multiple of the levels' downsampling.
        """
        check_inputs(x, t, y, context, (self.in_chans, None, None), self.num_classes, self.text)
        dtype = self.net.dtype
        condition = {"class_labels": y} if context is None else {"encoder_hidden_states": context.to(dtype)}
        with labels_in_range(y, self.num_classes):
            return self.net(x.to(dtype), t, **condition, return_dict=False)[0].to(x.dtype)  # (B, C, H, W)
