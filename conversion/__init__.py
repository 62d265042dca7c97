"""Published weights, brought into the classes of this collection and of diffusers."""

from typing import TYPE_CHECKING

from tonefield._lazy import attach


if TYPE_CHECKING:
    from .pfgm_unet import convert_pfgm_unet as convert_pfgm_unet
    from .sedd import convert_sedd as convert_sedd
    from .wavtokenizer import convert_wavtokenizer as convert_wavtokenizer

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "convert_pfgm_unet": "pfgm_unet",
        "convert_sedd": "sedd",
        "convert_wavtokenizer": "wavtokenizer",
    },
)
