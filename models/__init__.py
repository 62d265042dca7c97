"""What owns weights or a fixed transform of sound: networks, audio tokenizers, vocoders, the mel front end."""

from typing import TYPE_CHECKING

from tonefield._lazy import attach


if TYPE_CHECKING:
    from .discriminator_patch import PatchDiscriminator as PatchDiscriminator
    from .mel_spectrogram import MelSpectrogram as MelSpectrogram
    from .unet_2d_pfgm import PFGMUNet2DModel as PFGMUNet2DModel
    from .unet_2d_pfgm_transformer import PFGMTransformerUNet2DModel as PFGMTransformerUNet2DModel

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "MelSpectrogram": "mel_spectrogram",
        "PFGMTransformerUNet2DModel": "unet_2d_pfgm_transformer",
        "PFGMUNet2DModel": "unet_2d_pfgm",
        "PatchDiscriminator": "discriminator_patch",
    },
)
