"""Draws the pictures of docs/, each from the schedulers and front ends that it explains.

make docs
"""

import math
from io import BytesIO
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import DDPMScheduler
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tonefield import MelSpectrogram, load
from tonefield.data.synthetic import synthesize
from tonefield.schedulers import PoissonFlowScheduler, ScoreEntropyScheduler, empirical_denoiser
from tonefield.schedulers.scheduling_score_entropy import NOISE_SCHEDULES


BLUE, ORANGE, GREY = "#2a6f97", "#e07a3f", "#8d99ae"
LIMIT = None  # of D: EDM diffusion


def name_of(aug_dim: float | None) -> str:
    return "D → ∞" if aug_dim is None else f"D = {aug_dim:g}"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def exact_path(scheduler: PoissonFlowScheduler, sample: torch.Tensor, data: torch.Tensor, steps: int):
    """The samples at every level on their way from noise to data, with the exact denoiser, and the levels."""
    scheduler.set_timesteps(steps)
    path, sigmas = [sample], scheduler.sigmas.tolist()
    for index, t in enumerate(scheduler.timesteps):
        denoised = empirical_denoiser(sample, data, sigmas[index], scheduler.config.aug_dim)
        sample = scheduler.step(denoised, t, sample).prev_sample
        path.append(sample)
    return torch.stack(path), sigmas


def euler(aug_dim: float | None, sigma_max: float) -> PoissonFlowScheduler:
    return PoissonFlowScheduler(
        aug_dim=aug_dim, sigma_min=0.01, sigma_max=sigma_max, sigma_schedule="exponential",
        prediction_type="sample", solver_type="euler",
    )  # fmt: skip


def field_lines():
    """Lines of the field over one number x and the noise level, for several D."""
    data = torch.tensor([[-1.5], [-0.9], [0.4], [1.6]], dtype=torch.float64)
    figure, axes = plt.subplots(1, 3, figsize=(9, 3), sharey=True, layout="constrained")
    for axis, aug_dim in zip(axes, (1, 8, LIMIT), strict=True):
        scheduler = euler(aug_dim, 4.0)
        start = torch.linspace(-9, 9, 31, dtype=torch.float64)[:, None]
        path, sigmas = exact_path(scheduler, start, data, 300)
        axis.plot(path[:, :, 0].numpy(), sigmas, color=BLUE, linewidth=0.7)
        axis.plot(data[:, 0].numpy(), [0] * len(data), "o", color=ORANGE, clip_on=False, zorder=3)
        axis.set(title=name_of(aug_dim), xlabel="x", xlim=(-5, 5), ylim=(0, 4))
    axes[0].set_ylabel("noise level σ")
    return figure


def noise_law():
    """How far noise of level 1 lies from where it started, for several D."""
    size = 4096
    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    bins = np.geomspace(0.3, 30, 120)
    for aug_dim, colour in ((1, ORANGE), (8, GREY), (128, BLUE), (LIMIT, "black")):
        noise = PoissonFlowScheduler(aug_dim=aug_dim).sample_noise((3000, size), generator())
        axis.hist(
            (noise.norm(dim=1) / math.sqrt(size)).numpy(), bins, histtype="step", color=colour, label=name_of(aug_dim)
        )
    axis.set(xscale="log", yscale="log", xlabel=f"norm of the noise / √N, N = {size}", ylabel="of 3000 draws")
    axis.legend(frameon=False)
    return figure


def on_the_way():
    """Points in the plane on their way from noise to data."""
    angle = torch.linspace(0, 3.5 * math.pi, 400, dtype=torch.float64)
    data = torch.stack([angle * angle.cos(), angle * angle.sin()], dim=1) / 6
    scheduler = euler(2, 10.0)
    start = scheduler.sample_noise((500, 2), generator(), dtype=torch.float64) * scheduler.init_noise_sigma
    path, sigmas = exact_path(scheduler, start, data, 60)
    figure, axes = plt.subplots(1, 5, figsize=(10, 2.3), layout="constrained")
    for axis, index in zip(axes, (0, 20, 30, 42, 60), strict=True):
        width = 2.4 + 3 * sigmas[index]
        axis.plot(*data.T.numpy(), color=ORANGE, linewidth=0.8, alpha=0.6)
        axis.plot(*path[index].T.numpy(), ".", color=BLUE, markersize=2)
        axis.set(title=f"σ = {sigmas[index]:.2g}", xlim=(-width, width), ylim=(-width, width), xticks=[], yticks=[])
    return figure


def noisy_mels():
    """A mel spectrogram at several times of the diffusion that latent models are trained with."""
    mel = MelSpectrogram.from_preset("sc09-64")
    sound = synthesize("plucks", 2.0, mel.config.sample_rate, seed=3)[None, : mel.slice_samples]
    clean, scheduler = mel.encode(torch.from_numpy(sound)), DDPMScheduler()
    noise = torch.randn(clean.shape, generator=generator())
    figure, axes = plt.subplots(1, 5, figsize=(10, 2.3), layout="constrained")
    for axis, time in zip(axes, (0, 100, 250, 500, 999), strict=True):
        shown = scheduler.add_noise(clean, noise, torch.tensor([time])) if time else clean
        share = scheduler.alphas_cumprod[time].item() if time else 1.0
        axis.imshow(
            shown[0, 0].numpy(), origin="lower", cmap="magma", vmin=-2, vmax=2, aspect="auto", interpolation="nearest"
        )
        axis.set(title=f"t = {time}, ᾱ = {share:.2g}", xticks=[], yticks=[])
    return figure


def guidance():
    """What guidance does to samples of one number, with exact denoisers of a class and of everything."""
    data = torch.tensor([[-2.0], [-1.2], [0.3], [1.1], [2.0]], dtype=torch.float64)
    wanted = data[2:]
    figure, axes = plt.subplots(1, 4, figsize=(10, 2.2), sharey=True, layout="constrained")
    for axis, scale in zip(axes, (0, 1, 2, 4), strict=True):
        scheduler = euler(LIMIT, 10.0)
        scheduler.set_timesteps(60)
        sample = scheduler.sample_noise((4000, 1), generator(), dtype=torch.float64) * scheduler.init_noise_sigma
        for sigma, t in zip(scheduler.sigmas.tolist(), scheduler.timesteps, strict=False):
            of_all, of_class = (empirical_denoiser(sample, among, sigma, LIMIT) for among in (data, wanted))
            sample = scheduler.step(of_all + scale * (of_class - of_all), t, sample).prev_sample
        spread = sample + 0.08 * torch.randn(sample.shape, generator=generator(1), dtype=torch.float64)
        axis.hist(spread[:, 0].numpy(), np.linspace(-3, 3, 61), color=BLUE)
        axis.plot(wanted[:, 0].numpy(), [0] * len(wanted), "o", color=ORANGE, clip_on=False)
        axis.set(title=f"guidance_scale = {scale}", xlabel="x", yticks=[])
    return figure


def masks():
    """Tokens under noise, of both graphs, over time."""
    tokens = torch.arange(24).repeat(32, 1) // 3
    times = torch.linspace(0, 1, 32)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
    for axis, graph in zip(axes, ("absorb", "uniform"), strict=True):
        scheduler = ScoreEntropyScheduler(vocab_size=8, graph_type=graph)
        # The same numbers decide at every time, so that rows show one sequence as it is destroyed.
        noisy = scheduler.add_noise(tokens, times, [generator(1) for _ in times])
        shown = np.ma.masked_equal(noisy.numpy(), 8)
        axis.imshow(
            shown,
            cmap=plt.get_cmap("tab10").with_extremes(bad="#222222"),
            vmin=0,
            vmax=9,
            aspect="auto",
            interpolation="nearest",
        )
        axis.set(
            title=f'graph_type="{graph}"', xlabel="position", xticks=[], yticks=[0, 31], yticklabels=["t = 0", "1"]
        )
    return figure


def schedules():
    """The share of tokens that noise has touched, over time; and how many network calls a sampler needs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    time = torch.linspace(0, 1, 101, dtype=torch.float64)
    for name in NOISE_SCHEDULES:
        masked = ScoreEntropyScheduler(vocab_size=8, noise_schedule=name).noise.masked(time)
        left.plot(time.numpy(), masked.numpy(), label=name)
    left.set(xlabel="t", ylabel="touched tokens, m(t)")
    left.legend(frameon=False, fontsize=8, loc=(0.62, 0.02))
    steps = np.unique(np.geomspace(1, 4096, 200).round())
    for length, colour in ((100, ORANGE), (300, BLUE)):
        right.plot(steps, np.minimum(steps, length), color=colour, label=f"{length} tokens")
    right.plot(steps, steps, ":", color=GREY, label="a call for every step")
    right.set(xlabel="num_inference_steps", ylabel="network calls at most", xscale="log", yscale="log")
    right.legend(frameon=False)
    return figure


def digits_from_noise():
    """The ten digits on their way from noise to speech, by the model that comes along."""
    pipe = load(Path(__file__).resolve().parents[1] / "pretrained" / "digits-poisson-flow")
    pipe.set_progress_bar_config(disable=True)
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    states = []

    def remember(_, step, timestep, shown):
        states.append(shown["latents"])
        return shown

    first = [generator(seed) for seed in range(len(names))]
    states.append(pipe.prepare_noise(len(names), first) * pipe.scheduler.init_noise_sigma)
    pipe(
        class_labels=list(names), guidance_scale=3.0, num_inference_steps=18, output_type="mel",
        generator=[generator(seed) for seed in range(len(names))], callback_on_step_end=remember,
    )  # fmt: skip
    rows, levels = (0, 10, 12, 18), pipe.scheduler.sigmas.tolist()
    figure, axes = plt.subplots(len(rows), len(names), figsize=(10, 4.3), layout="constrained")
    for place, line in zip(rows, axes, strict=True):
        # Noise of level sigma on data of spread sigma_data, brought to the spread of the data.
        scale = pipe.scheduler.config.sigma_data / math.hypot(pipe.scheduler.config.sigma_data, levels[place])
        for axis, state in zip(line, states[place], strict=True):
            axis.imshow((scale * state[0]).numpy(), origin="lower", cmap="magma", vmin=-0.7, vmax=1.4, aspect="auto")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(f"σ = {levels[place]:.2g}")
    for axis, name in zip(axes[-1], names, strict=True):
        axis.set_xlabel(name)
    return figure


PICTURES = (digits_from_noise, field_lines, noise_law, on_the_way, noisy_mels, guidance, masks, schedules)


def draw_all(folder: Path) -> None:
    """Draws every picture: the same bytes with the same version of Matplotlib, which the picture names."""
    folder.mkdir(parents=True, exist_ok=True)
    plt.switch_backend("Agg")
    about = PngInfo()
    about.add_text("Software", f"Matplotlib {matplotlib.__version__}")
    for draw in PICTURES:
        with plt.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
            figure = draw()
        with BytesIO() as file:
            figure.savefig(file, dpi=100)
            picture = Image.open(file).convert("RGB")
        few_colours = picture.quantize(80, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few_colours.save(folder / f"{draw.__name__}.png", optimize=True, pnginfo=about)
        plt.close(figure)


if __name__ == "__main__":
    draw_all(Path(__file__).parent / "pictures")
