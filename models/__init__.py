"""What owns weights or a fixed transform of sound: networks, audio tokenizers, vocoders, the mel front end."""

from typing import TYPE_CHECKING

from tonefield._lazy import attach


if TYPE_CHECKING:
    from .audio_tokenizer_mulaw import MuLawTokenizer as MuLawTokenizer
    from .codec_fsq import FSQCodec as FSQCodec
    from .codec_transformers import TransformersCodec as TransformersCodec
    from .discriminator_patch import PatchDiscriminator as PatchDiscriminator
    from .loading import load_audio_tokenizer as load_audio_tokenizer
    from .loading import load_vocoder as load_vocoder
    from .mel_spectrogram import MelSpectrogram as MelSpectrogram
    from .transformer_sedd import SEDDTransformer1DModel as SEDDTransformer1DModel
    from .unet_2d_pfgm import PFGMUNet2DModel as PFGMUNet2DModel
    from .unet_2d_pfgm_transformer import PFGMTransformerUNet2DModel as PFGMTransformerUNet2DModel
    from .unet_2d_song import SongUNet2DModel as SongUNet2DModel
    from .wavtokenizer import WavTokenizer as WavTokenizer

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "FSQCodec": "codec_fsq",
        "MelSpectrogram": "mel_spectrogram",
        "MuLawTokenizer": "audio_tokenizer_mulaw",
        "PFGMTransformerUNet2DModel": "unet_2d_pfgm_transformer",
        "PFGMUNet2DModel": "unet_2d_pfgm",
        "PatchDiscriminator": "discriminator_patch",
        "SEDDTransformer1DModel": "transformer_sedd",
        "SongUNet2DModel": "unet_2d_song",
        "TransformersCodec": "codec_transformers",
        "WavTokenizer": "wavtokenizer",
        "load_audio_tokenizer": "loading",
        "load_vocoder": "loading",
    },
)
