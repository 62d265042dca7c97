"""What owns the order of events: from noise to sound, with the components that a repository holds."""

from typing import TYPE_CHECKING

from tonefield._lazy import attach


if TYPE_CHECKING:
    from .loading import load as load
    from .pipeline_mel_pfgm import MelPFGMPipeline as MelPFGMPipeline
    from .pipeline_sedd_token import SEDDTokenPipeline as SEDDTokenPipeline

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "MelPFGMPipeline": "pipeline_mel_pfgm",
        "SEDDTokenPipeline": "pipeline_sedd_token",
        "load": "loading",
    },
)
