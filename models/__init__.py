"""What owns weights or a fixed transform of sound: networks, audio tokenizers, vocoders, the mel front end."""

from typing import TYPE_CHECKING

from tonefield._lazy import attach


if TYPE_CHECKING:
    from .mel_spectrogram import MelSpectrogram as MelSpectrogram
    from .transformer_sedd import SEDDTransformer1DModel as SEDDTransformer1DModel

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "MelSpectrogram": "mel_spectrogram",
        "SEDDTransformer1DModel": "transformer_sedd",
    },
)
