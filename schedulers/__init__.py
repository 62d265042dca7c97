"""What owns the step, the noise law and the sampling grid."""

from typing import TYPE_CHECKING

from tonefield._lazy import attach


if TYPE_CHECKING:
    from .poisson_field import empirical_denoiser as empirical_denoiser
    from .poisson_field import pfgm_hyperparameters as pfgm_hyperparameters
    from .poisson_field import poisson_field as poisson_field
    from .scheduling_poisson_flow import PoissonFlowScheduler as PoissonFlowScheduler

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "PoissonFlowScheduler": "scheduling_poisson_flow",
        "empirical_denoiser": "poisson_field",
        "pfgm_hyperparameters": "poisson_field",
        "poisson_field": "poisson_field",
    },
)
