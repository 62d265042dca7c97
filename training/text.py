"""Captions as a network reads them: each different one is encoded once, before the training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from tqdm.auto import tqdm

from tonefield.command_line import UserError, first_line
from tonefield.pipelines import encode_text
from tonefield.training.checkpoints import fingerprint_of
from tonefield.training.data import TrainingData


logger = get_logger(__name__)

AT_A_TIME = 64  # captions that are encoded together


def open_text_encoder(args) -> tuple[Any, Any]:
    """The tokenizer and the encoder of texts, which are not trained; `None` twice without --text_encoder."""
    if args.text_encoder is None:
        return None, None
    from transformers import AutoTokenizer, T5EncoderModel

    try:
        tokenizer = AutoTokenizer.from_pretrained(args.text_encoder)
        encoder = T5EncoderModel.from_pretrained(args.text_encoder, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UserError(f"--text_encoder {args.text_encoder} cannot be loaded: {first_line(error)}") from None
    return tokenizer, encoder.requires_grad_(False).eval()


def text_fingerprint(tokenizer, encoder) -> str:
    """What a resumed run must find unchanged."""
    return fingerprint_of(encoder, len(tokenizer), tokenizer.model_max_length)


@dataclass(frozen=True)
class Texts:
    """
    What `encode_text` makes of many texts, in memory: the states of all tokens one after another, and where those of
    each text begin. The first text is the empty one, the null of guidance.
    """

    numbers: dict[str, int]
    states: torch.Tensor
    starts: torch.Tensor

    def __call__(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """States (texts, tokens, width), 0 beyond the end of each, and their mask; as long as the longest."""
        rows = torch.tensor([self.numbers[text] for text in texts])
        first, count = self.starts[rows], self.starts[rows + 1] - self.starts[rows]
        place = torch.arange(int(count.max()))
        mask = place < count[:, None]
        states = self.states[torch.where(mask, first[:, None] + place, 0)]
        return {"text_states": states * mask[..., None], "text_mask": mask}


def encode_texts(tokenizer, encoder, texts: Sequence[str], device: torch.device | str, progress: bool = True) -> Texts:
    """Each different text once; the encoder is on the device only meanwhile."""
    different = list(dict.fromkeys(["", *texts]))
    states, counts, cut_off = [], [], []
    encoder.to(device)
    for start in tqdm(range(0, len(different), AT_A_TIME), desc="captions", disable=None if progress else True):
        some = different[start : start + AT_A_TIME]
        found, mask = encode_text(tokenizer, encoder, some, cut_off=cut_off)
        states.append(found[mask].float().cpu())
        counts.append(mask.sum(dim=1).cpu())
    encoder.to("cpu")
    if cut_off:
        logger.warning(
            f"{len(cut_off)} of {len(different) - 1} different captions are longer than the"
            f" {tokenizer.model_max_length} tokens that the text encoder takes. The first loses {cut_off[0]!r}."
        )
    starts = torch.cat([torch.zeros(1, dtype=torch.long), torch.cat(counts).cumsum(0)])
    return Texts({text: number for number, text in enumerate(different)}, torch.cat(states), starts)


@dataclass(frozen=True)
class ReadTexts:
    """Adds the states of the captions to what another reader makes of the rows."""

    read: Callable[[dict, list[int]], dict]
    column: str
    texts: Texts

    def __call__(self, columns: dict, positions: list[int]) -> dict:
        return self.read(columns, positions) | self.texts([str(text) for text in columns[self.column]])


def captions_of(rows: Any, column: str, name: str) -> list[str]:
    """The captions of all rows; a row without one is refused."""
    captions = [str(text or "") for text in rows.select_columns([column]).with_format(None)[column][:]]
    missing = [row for row, text in enumerate(captions) if not text.strip()]
    if missing:
        raise UserError(
            f"--caption_column: {len(missing)} of {len(captions)} rows of {name} have no text in {column!r}, the first"
            f" is row {missing[0]}. Give them captions, or leave these recordings out."
        )
    return captions


def add_texts(args, data: TrainingData, tokenizer, encoder, device, progress: bool = True) -> Texts:
    """Has the readers of a dataset give the states of the captions with each row."""
    captions = captions_of(data.train.rows, args.caption_column, f"the split {args.train_split!r}")
    if data.validation is not None:
        captions += captions_of(data.validation, args.caption_column, f"the split {args.validation_split!r}")
    texts = encode_texts(tokenizer, encoder, captions, device, progress)
    data.read = data.train.read = ReadTexts(data.read, args.caption_column, texts)
    return texts


def withhold(states: torch.Tensor, mask: torch.Tensor, which: torch.Tensor, null: torch.Tensor):
    """States and mask, those of the empty text in the rows that `which` says."""
    tokens = max(len(null), mask.shape[1])
    missing = tokens - mask.shape[1]
    states, mask = (torch.nn.functional.pad(x, (0, 0) * (x.ndim - 2) + (0, missing)) for x in (states, mask))
    empty = torch.nn.functional.pad(null, (0, 0, 0, tokens - len(null)))
    there = torch.arange(tokens, device=mask.device) < len(null)
    return torch.where(which[:, None, None], empty, states), torch.where(which[:, None], there, mask)


def some_captions(data: TrainingData, column: str, count: int) -> list[str]:
    """Different held-out captions, or training captions where nothing is held out; again from the start if few."""
    rows: Any = data.train.rows if data.validation is None else data.validation
    wanted = np.linspace(0, len(rows) - 1, min(len(rows), 1000)).astype(int).tolist()
    different = list(dict.fromkeys(map(str, rows.select_columns([column])[wanted][column])))
    return [different[index % len(different)] for index in range(count)]
