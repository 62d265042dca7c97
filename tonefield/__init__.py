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
    from .models import MelSpectrogram as MelSpectrogram
    from .pipelines import LatentAudioDiffusionPipeline as LatentAudioDiffusionPipeline
    from .pipelines import MelPFGMPipeline as MelPFGMPipeline
    from .pipelines import load as load
    from .schedulers import PoissonFlowScheduler as PoissonFlowScheduler
    from .schedulers import ScoreSDEScheduler as ScoreSDEScheduler

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "LatentAudioDiffusionPipeline": "pipelines",
        "MelPFGMPipeline": "pipelines",
        "MelSpectrogram": "models",
        "PoissonFlowScheduler": "schedulers",
        "ScoreSDEScheduler": "schedulers",
        "load": "pipelines",
    },
)
