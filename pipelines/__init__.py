"""What owns the order of events: from noise to sound, with the components that a repository holds."""

from typing import TYPE_CHECKING

from tonefield._lazy import attach


if TYPE_CHECKING:
    from .loading import load as load
    from .pipeline_latent_audio_diffusion import LatentAudioDiffusionPipeline as LatentAudioDiffusionPipeline
    from .pipeline_mel_pfgm import MelPFGMPipeline as MelPFGMPipeline
    from .pipeline_sedd_token import SEDDTokenPipeline as SEDDTokenPipeline
    from .tonefield_text import encode_text as encode_text

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "LatentAudioDiffusionPipeline": "pipeline_latent_audio_diffusion",
        "MelPFGMPipeline": "pipeline_mel_pfgm",
        "SEDDTokenPipeline": "pipeline_sedd_token",
        "encode_text": "tonefield_text",
        "load": "loading",
    },
)
