"""Made-up music: three kinds of sound to try things on when no recordings are at hand."""

import numpy as np


KINDS = ("plucks", "pads", "drums")

_PENTATONIC = np.array([0, 2, 4, 7, 9])  # semitones: any of them sound well together


def synthesize(kind: str, seconds: float, sample_rate: int, seed: int = 0) -> np.ndarray:
    """A piece of one kind of sound: float32 samples with a peak of 0.5, the same for the same seed.

    `"plucks"` is a quick melody of decaying notes, `"pads"` are slow chords, `"drums"` a beat of kicks and noise.
    """
    rng = np.random.default_rng([KINDS.index(kind), seed])
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    beat = 60 / rng.uniform(80, 140)
    sound = np.zeros_like(time)

    def note(degree: np.integer) -> float:
        """The frequency of a step of the pentatonic scale on A2."""
        return 110 * 2 ** (_PENTATONIC[degree % 5] / 12 + degree // 5)

    def tone(frequency: float, brightness: float) -> np.ndarray:
        harmonics = np.arange(1, 13)
        harmonics = harmonics[harmonics * frequency < 0.45 * sample_rate]
        phases = rng.uniform(0, 2 * np.pi, len(harmonics))
        h = harmonics[:, None]
        return (h**-brightness * np.sin(2 * np.pi * h * frequency * time + phases[:, None])).sum(0)

    def since(onset: float) -> np.ndarray:
        """Seconds since an onset, and infinitely many before it."""
        return np.where(time >= onset, time - onset, np.inf)

    if kind == "plucks":
        for onset in np.arange(0, seconds, beat / 2):
            if rng.random() < 0.8 or onset == 0:  # a short piece has one note at least
                sound += tone(note(rng.integers(3, 15)), 1.5) * np.exp(-since(onset) * 6)
    elif kind == "pads":
        for onset in np.arange(0, seconds, 4 * beat):
            swell = np.clip((time - onset) / (2 * beat), 0, 1) * np.clip((onset + 6 * beat - time) / (2 * beat), 0, 1)
            for degree in rng.choice(10, 3, replace=False):
                sound += swell * tone(note(degree), 2.0)
    else:
        noise = rng.standard_normal(len(time))
        for step, onset in enumerate(np.arange(0, seconds, beat / 2)):
            age = since(onset)
            if step % 2 == 0:  # a kick drum: a sine that falls from 150 to 50 Hz
                fall = np.where(np.isfinite(age), age, 0)
                sound += np.sin(2 * np.pi * (50 * fall + 5 * (1 - np.exp(-20 * fall)))) * np.exp(-age * 8)
            if step % 4 == 2 or rng.random() < 0.5:
                sound += rng.uniform(0.2, 0.6) * noise * np.exp(-age * rng.uniform(20, 60))
    return (0.5 * sound / np.abs(sound).max()).astype(np.float32)
