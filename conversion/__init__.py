"""Published weights, brought into the classes of this collection and of diffusers."""

from typing import TYPE_CHECKING

from tonefield._lazy import attach


if TYPE_CHECKING:
    from .audio_diffusion import convert_audio_diffusion as convert_audio_diffusion
    from .bigvgan import convert_bigvgan as convert_bigvgan
    from .ldm_autoencoder import convert_ldm_autoencoder as convert_ldm_autoencoder
    from .pfgm import convert_pfgm as convert_pfgm
    from .pfgm_unet import convert_ncsnpp as convert_ncsnpp
    from .pfgm_unet import convert_pfgm_unet as convert_pfgm_unet
    from .pfgmpp import convert_pfgmpp as convert_pfgmpp
    from .sedd import convert_sedd as convert_sedd
    from .wavtokenizer import convert_wavtokenizer as convert_wavtokenizer

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "convert_audio_diffusion": "audio_diffusion",
        "convert_bigvgan": "bigvgan",
        "convert_ldm_autoencoder": "ldm_autoencoder",
        "convert_ncsnpp": "pfgm_unet",
        "convert_pfgm": "pfgm",
        "convert_pfgm_unet": "pfgm_unet",
        "convert_pfgmpp": "pfgmpp",
        "convert_sedd": "sedd",
        "convert_wavtokenizer": "wavtokenizer",
    },
)
