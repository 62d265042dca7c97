"""What owns the step, the noise law and the sampling grid."""

from typing import TYPE_CHECKING

from tonefield._lazy import attach

# Not lazy: importing a submodule sets its name on the package, where the module would hide the function of that name.
from .poisson_field import empirical_denoiser, pfgm_hyperparameters, poisson_field


if TYPE_CHECKING:
    from .scheduling_poisson_flow import PoissonFlowScheduler as PoissonFlowScheduler
    from .scheduling_score_entropy import ScoreEntropyScheduler as ScoreEntropyScheduler
    from .scheduling_score_sde import ScoreSDEScheduler as ScoreSDEScheduler

__getattr__, _, __all__ = attach(
    __name__,
    {
        "PoissonFlowScheduler": "scheduling_poisson_flow",
        "ScoreEntropyScheduler": "scheduling_score_entropy",
        "ScoreSDEScheduler": "scheduling_score_sde",
    },
)
__all__ += ["empirical_denoiser", "pfgm_hyperparameters", "poisson_field"]


def __dir__():
    return sorted(__all__)
