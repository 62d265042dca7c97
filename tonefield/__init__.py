"""tonefield: audio generation with Poisson flow, latent diffusion and score-entropy discrete diffusion."""

from pathlib import Path as _Path
from typing import TYPE_CHECKING

from ._lazy import attach


__version__ = "0.1.0.dev0"

# An installed wheel holds `models/`, `data/`, ... and the scripts inside this folder. In a source checkout they are
# its siblings, so look there as well: a fresh clone works without being installed, an editable install needs no hook.
_root = _Path(__file__).resolve().parents[1]
if (_root / "setup.py").is_file() and (_root / "models").is_dir():
    __path__.append(str(_root))

if TYPE_CHECKING:
    from .models import FSQCodec as FSQCodec
    from .models import MelSpectrogram as MelSpectrogram
    from .models import MuLawTokenizer as MuLawTokenizer
    from .models import PFGMTransformerUNet2DModel as PFGMTransformerUNet2DModel
    from .models import PFGMUNet2DModel as PFGMUNet2DModel
    from .models import SEDDTransformer1DModel as SEDDTransformer1DModel
    from .models import SongUNet2DModel as SongUNet2DModel
    from .models import TransformersCodec as TransformersCodec
    from .models import WavTokenizer as WavTokenizer
    from .pipelines import LatentAudioDiffusionPipeline as LatentAudioDiffusionPipeline
    from .pipelines import MelPFGMPipeline as MelPFGMPipeline
    from .pipelines import SEDDTokenPipeline as SEDDTokenPipeline
    from .pipelines import load as load
    from .schedulers import PoissonFlowScheduler as PoissonFlowScheduler
    from .schedulers import ScoreEntropyScheduler as ScoreEntropyScheduler
    from .schedulers import ScoreSDEScheduler as ScoreSDEScheduler

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "FSQCodec": "models",
        "LatentAudioDiffusionPipeline": "pipelines",
        "MelPFGMPipeline": "pipelines",
        "MelSpectrogram": "models",
        "MuLawTokenizer": "models",
        "PFGMTransformerUNet2DModel": "models",
        "PFGMUNet2DModel": "models",
        "PoissonFlowScheduler": "schedulers",
        "SEDDTokenPipeline": "pipelines",
        "SEDDTransformer1DModel": "models",
        "ScoreEntropyScheduler": "schedulers",
        "ScoreSDEScheduler": "schedulers",
        "SongUNet2DModel": "models",
        "TransformersCodec": "models",
        "WavTokenizer": "models",
        "load": "pipelines",
    },
)
