"""Networks that are exactly what a perfectly trained network would be, for data that is known."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput

from tonefield.schedulers import empirical_denoiser


class ExactDenoiser(ModelMixin, ConfigMixin):
    """
    The best network for a few mels, one class for each `len(data) / classes` of them in turn, and the null class.

    `kind` is what it returns: `"sample"` for Poisson flow, `"edm"` for the preconditioned output of EDM, `"epsilon"`
    for a VE score SDE (conditioned on sigma).
    """

    @register_to_config
    def __init__(self, in_channels=1, sample_size=None, num_class_embeds=None, aug_dim=None, kind="sample"):
        super().__init__()

    def denoise(self, x, sigma, class_labels):
        if self.config.num_class_embeds is None:
            return empirical_denoiser(x, self.data, sigma, self.config.aug_dim)
        classes = (*self.data.chunk(self.config.num_class_embeds - 1), self.data)
        rows = [
            empirical_denoiser(x[i : i + 1], classes[label], sigma[i : i + 1], self.config.aug_dim)
            for i, label in enumerate(class_labels.tolist())
        ]
        return torch.cat(rows)

    def forward(self, sample, timestep, class_labels=None):
        assert sample.dtype == self.dtype
        x, timestep = sample.double(), timestep.double().expand(len(sample))
        if self.config.kind == "epsilon":
            return UNet2DOutput(
                ((x - self.denoise(x, timestep, class_labels)) / timestep[:, None, None, None]).float()
            )
        sigma = torch.exp(4 * timestep)
        if self.config.kind == "sample":
            return UNet2DOutput(self.denoise(x, sigma, class_labels).to(sample.dtype))
        total = (sigma**2 + 0.25).sqrt()[:, None, None, None]
        x = x * total  # the network sees c_in x
        skipped = 0.25 / total**2 * x
        output = (self.denoise(x, sigma, class_labels) - skipped) / (0.5 * sigma[:, None, None, None] / total)
        return UNet2DOutput(output.to(sample.dtype))


class GaussianDenoiser(ModelMixin, ConfigMixin):
    """The best network for numbers of law N(0, spread^2): Dn = spread^2 x / (spread^2 + sigma^2)."""

    @register_to_config
    def __init__(self, spread, sample_size=(4, 4), in_channels=1):
        super().__init__()
        self.register_buffer("unused", torch.zeros(1))

    def forward(self, sample, timestep, class_labels=None):
        sigma = torch.exp(4 * timestep).reshape(-1, 1, 1, 1)
        return UNet2DOutput(self.config.spread**2 / (self.config.spread**2 + sigma**2) * sample)


class ExactNoise(ExactDenoiser):
    """
    The same for noise that is added to shrunken data, mean(t) y + std(t) noise, as in DDPM and VP.

    `kind` is `"epsilon"`, `"score"` or `"v_prediction"`; `marginal` gives mean and std of timesteps.
    """

    def forward(self, sample, timestep, class_labels=None):
        x = sample.double()
        mean, std = (value.double().expand(len(x)) for value in self.marginal(timestep))
        data = self.denoise(x / mean[:, None, None, None], std / mean, class_labels)
        mean, std = mean[:, None, None, None], std[:, None, None, None]
        noise = (x - mean * data) / std
        output = {"epsilon": noise, "score": -noise / std, "v_prediction": mean * noise - std * data}[self.config.kind]
        return UNet2DOutput(output.to(sample.dtype))


class GaussianNoise(ModelMixin, ConfigMixin):
    """The noise in numbers of law N(0, spread^2): std x / (mean^2 spread^2 + std^2)."""

    @register_to_config
    def __init__(self, spread, sample_size=(4, 4), in_channels=1):
        super().__init__()
        self.register_buffer("unused", torch.zeros(1))

    def forward(self, sample, timestep, class_labels=None):
        mean, std = (value.reshape(-1, 1, 1, 1) for value in self.marginal(timestep))
        return UNet2DOutput((std / (mean**2 * self.config.spread**2 + std**2) * sample).to(sample.dtype))


def noise_of(scheduler):
    """`marginal` of a scheduler of ours or of diffusers."""
    if hasattr(scheduler, "equation"):
        return lambda timestep: scheduler.equation.marginal(scheduler.time_of(timestep.double()))

    def marginal(timestep):
        kept = scheduler.alphas_cumprod[timestep.long()].double()
        return kept.sqrt(), (1 - kept).sqrt()

    return marginal


def exact_noise(data, scheduler, classes=None, kind="epsilon"):
    network = ExactNoise(data.shape[1], tuple(data.shape[2:]), classes and classes + 1, kind=kind)
    network.register_buffer("data", data)
    network.marginal = noise_of(scheduler)
    return network


def exact(data, aug_dim=128, classes=None, kind="sample"):
    denoiser = ExactDenoiser(data.shape[1], tuple(data.shape[2:]), classes and classes + 1, aug_dim=aug_dim, kind=kind)
    denoiser.register_buffer("data", data)
    return denoiser


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


class GaussianPredictor(ModelMixin, ConfigMixin):
    """
    The best network for data of law N(mean, spread^2), number by number; with spread 0, for data that are known.

    `kind` is what it predicts: `"epsilon"`, `"v_prediction"` or `"sample"` on the betas of diffusers' schedulers, the
    velocity of flow matching (`"flow"`), or the denoised sample of Poisson flow (`"poisson"`). There may be several
    means, a word for each: the text is then the number of the mean, in the first token that is not masked.
    """

    @register_to_config
    def __init__(self, in_channels=1, sample_size=None, cross_attention_dim=None, kind="epsilon", spread=0.0):
        super().__init__()

    def forward(self, sample, timestep, encoder_hidden_states=None, encoder_attention_mask=None):
        kind, variance = self.config.kind, self.config.spread**2
        time = torch.as_tensor(timestep).double().expand(len(sample)).reshape(-1, 1, 1, 1)
        which = torch.zeros(len(sample), dtype=torch.long)
        if encoder_hidden_states is not None:
            first = encoder_attention_mask.int().argmax(1)
            which = encoder_hidden_states[torch.arange(len(sample)), first, 0].round().long()
        mean, x = self.mean.double()[which], sample.double()
        if kind == "poisson":
            signal, noise = torch.ones_like(time), torch.exp(4 * time)
        elif kind == "flow":
            signal, noise = 1 - time / 1000, time / 1000
        else:  # between its steps sigma is linear, as Euler's and others' schedulers have it
            alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
            sigmas = ((1 - alphas) / alphas).sqrt()
            below = time.floor().long().clamp(max=998)
            sigma = torch.lerp(sigmas[below], sigmas[below + 1], time - below)
            signal, noise = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
        clean = mean + signal * variance * (x - signal * mean) / (signal**2 * variance + noise**2)
        epsilon = (x - signal * clean) / noise
        output = {
            "epsilon": epsilon, "v_prediction": signal * epsilon - noise * clean, "sample": clean, "poisson": clean,
            "flow": epsilon - clean,
        }[kind]  # fmt: skip
        return UNet2DOutput(output.to(sample.dtype))


def predictor(mean, kind="epsilon", spread=0.0, reads_text=False):
    network = GaussianPredictor(mean.shape[1], cross_attention_dim=1 if reads_text else None, kind=kind, spread=spread)
    network.register_buffer("mean", mean)
    return network
