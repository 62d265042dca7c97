"""How near each solver comes to the exact end of the trajectory, against the network calls it makes.

The network is exact: the denoiser of a few hundred real spectrograms, standardised as in training. Exact trajectories
end on one of them, so an error of the end means that some have strayed to another one: their share is shown.

    python benchmarks/solvers.py --dataset datasets/digits     # made by audio_to_images.py; made up when not given
"""

import argparse
from typing import Any

import torch
from _table import Row, show

from tonefield import MelSpectrogram, PoissonFlowScheduler
from tonefield.data.synthetic import KINDS, synthesize
from tonefield.schedulers import empirical_denoiser


SIGMA_DATA = 0.5
STEPS: dict[Any, tuple[int, ...]] = {
    "euler": (10, 18, 35, 70),
    "heun": (5, 9, 18, 36),
    "dpmsolver++": (5, 10, 18, 35),
    "rk45": (3, 5, 8, 14),
}


def charges(args: argparse.Namespace) -> torch.Tensor:
    """Spectrograms with mean 0 and standard deviation `SIGMA_DATA`."""
    if args.dataset:
        from tonefield.data.loading import load_split

        mels = torch.as_tensor(load_split(args.dataset).with_format("torch")[: args.charges]["mel"])
    else:
        front_end = MelSpectrogram.from_preset("fsdd-64")
        seconds = front_end.slice_samples / front_end.config.sample_rate
        sounds = [synthesize(KINDS[i % 3], seconds, front_end.config.sample_rate, i) for i in range(args.charges)]
        mels = front_end.encode(torch.stack([torch.from_numpy(sound) for sound in sounds]))
    mels = mels.double()
    return (mels - mels.mean()) / mels.std() * SIGMA_DATA


def rms(error: torch.Tensor) -> float:
    return error.square().mean().sqrt().item()


def row(aug_dim: float | None, solver: str, calls: int, error: torch.Tensor) -> str:
    each = error.flatten(1).square().mean(1).sqrt()
    strayed = (each > 1e-3).double().mean()
    return f"| {aug_dim or 'infinite'} | {solver} | {calls} | {rms(error):.1e} | {strayed:.0%} |"


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    data = charges(args)
    print(f"{len(data)} charges of {data[0].numel()} elements, {args.batch} samples")
    print("| D | solver | network calls | error of the end, rms | ends elsewhere |\n|---|---|---|---|---|")
    errors, rows = {}, []
    for aug_dim in (1, 128, None):

        def denoise(x, sigma, aug_dim=aug_dim):
            return empirical_denoiser(x, data, sigma, aug_dim)

        settings: dict[str, Any] = dict(aug_dim=aug_dim, prediction_type="sample", prior_radius_quantile=0.99)
        scheduler = PoissonFlowScheduler(**settings)
        sigma_max = scheduler.config.sigma_max
        generator = torch.Generator().manual_seed(0)
        latents = scheduler.sample_noise((args.batch, *data.shape[1:]), generator, dtype=torch.float64) * sigma_max
        exact: Any = scheduler.integrate(denoise, latents, sigma_max, 0, rtol=1e-9, atol=1e-9)
        for solver, counts in STEPS.items():
            scheduler = PoissonFlowScheduler(solver_type=solver, **settings)
            for steps in counts:
                scheduler.set_timesteps(steps)
                sample = latents
                for t in scheduler.timesteps:
                    denoised = denoise(sample, (4 * t.double()).exp().item())
                    sample = scheduler.step(denoised, t, sample).prev_sample
                print(row(aug_dim, solver, len(scheduler.timesteps), sample - exact), flush=True)
                errors[aug_dim, solver, len(scheduler.timesteps)] = rms(sample - exact)
        for tolerance in (1e-2, 1e-3, 1e-4):
            calls = 0

            def counted(x, sigma, denoise=denoise):
                nonlocal calls
                calls += 1
                return denoise(x, sigma)

            sample: Any = scheduler.integrate(counted, latents, sigma_max, 0, rtol=tolerance, atol=tolerance)
            print(row(aug_dim, f"adaptive, tolerance {tolerance:g}", calls, sample - exact), flush=True)
    print()
    for aug_dim in (1, 128, None):
        usual, ours = errors[aug_dim, "euler", 18], errors[aug_dim, "dpmsolver++", 18]
        name = f"error after 18 calls, D {aug_dim or 'infinite'}: Euler, DPM-Solver++"
        rows.append(Row(name, f"{usual:.1e}", f"{ours:.1e}", usual / max(ours, 1e-12)))
    show(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", metavar="DIR", help="a dataset of spectrograms")
    parser.add_argument("--charges", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    main(parser.parse_args())
