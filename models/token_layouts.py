"""The codes of several codebooks as the sequences that a model reads: pure functions, each with its inverse.

Codes have shape (batch, codebooks, frames) and lie in 0..codebook_size-1. A layout says where the code of a codebook k
and a frame f goes, and which symbols may stand there:

| layout           | tokens                            | symbol              | place          |
|------------------|-----------------------------------|---------------------|----------------|
| `single`         | (batch, frames)                   | code                | f; K = 1       |
| `flatten`        | (batch, frames * K)               | k * size + code     | f * K + k      |
| `codebook_major` | (batch, K * frames)               | k * size + code     | k * frames + f |
| `parallel`       | (batch, K, frames)                | code                | k, f           |
| `delay`          | (batch, K, frames + K - 1)        | code; `size` is pad | k, f + k       |

The mask of a diffusion process is no symbol of a layout: it comes after the last one.
"""

import torch


LAYOUTS = ("single", "flatten", "codebook_major", "parallel", "delay")


def vocabulary_size(layout: str, num_codebooks: int, codebook_size: int) -> int:
    """How many symbols a layout has, pads included."""
    _check_layout(layout, num_codebooks)
    if layout in ("flatten", "codebook_major"):
        return num_codebooks * codebook_size
    return codebook_size + (layout == "delay")


def token_places(layout: str, num_codebooks: int, num_frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The frame and the codebook of every token, each of the shape of the tokens of one sample.

    In `delay` frames below 0 and from `num_frames` on are those of pads.
    """
    _check_layout(layout, num_codebooks)
    frames = torch.arange(num_frames).expand(num_codebooks, -1)
    codebooks = torch.arange(num_codebooks)[:, None].expand(-1, num_frames)
    if layout == "flatten":
        return frames.T.flatten(), codebooks.T.flatten()
    if layout in ("single", "codebook_major"):
        return frames.flatten(), codebooks.flatten()
    if layout == "parallel":
        return frames, codebooks
    codebooks = torch.arange(num_codebooks)[:, None].expand(-1, num_frames + num_codebooks - 1)
    return torch.arange(num_frames + num_codebooks - 1) - codebooks, codebooks


def legal_symbols(layout: str, num_codebooks: int, codebook_size: int, num_frames: int) -> torch.Tensor:
    """Which symbols may stand where: True or False, of the shape of the tokens of one sample times the symbols."""
    frames, codebooks = token_places(layout, num_codebooks, num_frames)
    symbols = torch.arange(vocabulary_size(layout, num_codebooks, codebook_size))
    if layout in ("flatten", "codebook_major"):
        return symbols.div(codebook_size, rounding_mode="floor") == codebooks[..., None]
    pads = ((frames < 0) | (frames >= num_frames))[..., None]
    return (symbols == codebook_size) == pads


def apply_layout(codes: torch.Tensor, layout: str, codebook_size: int) -> torch.Tensor:
    """Codes of shape (batch, codebooks, frames) to the tokens of a layout."""
    if codes.ndim != 3:
        raise ValueError(f"Codes have shape (batch, codebooks, frames), not {tuple(codes.shape)}.")
    batch, num_codebooks, num_frames = codes.shape
    _check_layout(layout, num_codebooks)
    _check_range(codes, 0, codebook_size - 1, "codes")
    if layout == "parallel":
        return codes
    if layout == "delay":
        tokens = codes.new_full((batch, num_codebooks, num_frames + num_codebooks - 1), codebook_size)
        for k in range(num_codebooks):
            tokens[:, k, k : k + num_frames] = codes[:, k]
        return tokens
    symbols = codes + codebook_size * torch.arange(num_codebooks, device=codes.device)[:, None]
    return (symbols.transpose(1, 2) if layout == "flatten" else symbols).flatten(1)


def undo_layout(tokens: torch.Tensor, layout: str, num_codebooks: int, codebook_size: int) -> torch.Tensor:
    """The tokens of a layout to codes of shape (batch, codebooks, frames). A symbol out of its place is refused."""
    _check_layout(layout, num_codebooks)
    if layout in ("parallel", "delay"):
        if tokens.ndim != 3 or tokens.shape[1] != num_codebooks:
            raise ValueError(
                f"Tokens in the layout {layout!r} have shape (batch, {num_codebooks}, length),"
                f" not {tuple(tokens.shape)}."
            )
        codes = tokens
        if layout == "delay":
            frames = tokens.shape[2] - num_codebooks + 1
            if frames < 0:
                raise ValueError(f"{tokens.shape[2]} columns are too few for {num_codebooks} delayed codebooks.")
            codes = torch.stack([tokens[:, k, k : k + frames] for k in range(num_codebooks)], dim=1)
            if (tokens == codebook_size).sum() != tokens.numel() - codes.numel():
                raise ValueError(f"Delayed tokens have the pad {codebook_size} before and after each row of codes.")
    else:
        if tokens.ndim != 2 or tokens.shape[1] % num_codebooks:
            raise ValueError(
                f"Tokens in the layout {layout!r} have shape (batch, length) with a length divisible by"
                f" {num_codebooks}, not {tuple(tokens.shape)}."
            )
        shape = (-1, num_codebooks) if layout == "flatten" else (num_codebooks, -1)
        symbols = tokens.unflatten(1, shape)
        symbols = symbols.transpose(1, 2) if layout == "flatten" else symbols
        codes = symbols - codebook_size * torch.arange(num_codebooks, device=tokens.device)[:, None]
    _check_range(codes, 0, codebook_size - 1, "tokens, less what stands for their codebooks,")
    return codes


def _check_layout(layout: str, num_codebooks: int) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"There is no layout {layout!r}; the layouts are {', '.join(LAYOUTS)}.")
    if layout == "single" and num_codebooks != 1:
        raise ValueError(f"The layout 'single' is for one codebook, not for {num_codebooks}: use 'parallel'.")


def _check_range(codes: torch.Tensor, low: int, high: int, what: str) -> None:
    bad = (codes < low) | (codes > high)
    if bad.any():
        place = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{what[0].upper()}{what[1:]} lie in {low}..{high}; {codes[tuple(place)]} at {place} does not."
        )
