"""Captions as a network reads them: each different one is encoded once, before the training, and kept on the disk."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import torch
from accelerate.logging import get_logger
from tqdm.auto import tqdm

from tonefield.command_line import UserError
from tonefield.hub import hub_errors, hub_reason
from tonefield.models.loading import load_safely
from tonefield.pipelines import encode_text
from tonefield.pipelines.tonefield_text import tokenize_text
from tonefield.training.checkpoints import fingerprint_of
from tonefield.training.data import TrainingData


logger = get_logger(__name__)

AT_A_TIME = 64  # captions that are encoded together
SCHEMA = pyarrow.schema([("text", pyarrow.large_string()), ("states", pyarrow.large_list(pyarrow.float32()))])


def open_text_encoder(args) -> tuple[Any, Any]:
    """The tokenizer and the encoder of texts, which are not trained; `None` twice without --text_encoder."""
    if args.text_encoder is None:
        return None, None
    from transformers import AutoTokenizer, T5EncoderModel

    try:
        # Without a word about code of the repository, transformers would ask whether to run it.
        tokenizer = load_safely(AutoTokenizer.from_pretrained, args.text_encoder, trust_remote_code=False)
        encoder, info = load_safely(
            T5EncoderModel.from_pretrained, args.text_encoder, use_safetensors=True, output_loading_info=True
        )
        if missing := sorted(info["missing_keys"]):  # which transformers makes up, and only warns
            raise ValueError(f"{len(missing)} of its tensors are missing, the first is {missing[0]}")
    except hub_errors() as error:
        raise UserError(f"--text_encoder {args.text_encoder} cannot be loaded: {hub_reason(error)}") from None
    return tokenizer, encoder.requires_grad_(False).eval()


def make_text_encoder(
    captions: Sequence[str],
    output_dir: str | os.PathLike,
    width: int = 128,
    vocab_size: int = 4000,
    max_length: int = 128,
    seed: int = 0,
) -> None:
    """
    Writes a small T5 for captions, for `--text_encoder`. Its tokenizer is trained on the captions, its weights are
    random: it knows no language, but different captions get different states. (T5 of the Hub know what words mean.)

    Args:
        captions (`list[str]`): The texts whose words it is to know.
        output_dir (`str` or `os.PathLike`): The folder to write.
        width (`int`, *optional*, defaults to 128): Of the states, a multiple of 8.
        vocab_size (`int`, *optional*, defaults to 4000): Most pieces of words.
        max_length (`int`, *optional*, defaults to 128): Most tokens of a caption.
        seed (`int`, *optional*, defaults to 0): Of the weights.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    captions = [text for text in captions if text and text.strip()]
    if not captions:
        raise ValueError("There are no captions to make a text encoder of.")
    words = Tokenizer(models.Unigram())
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    words.train_from_iterator(captions, trainer)
    pieces = [(piece, score) for piece, score in json.loads(words.to_str())["model"]["vocab"]]
    # In the order of the alphabet, for that of the trainer is another one each time.
    pieces = pieces[: len(special)] + sorted(pieces[len(special) :])
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=max_length)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=width // 8,
        dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = T5EncoderModel(config)
    encoder.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def text_fingerprint(tokenizer, encoder) -> str:
    """What a resumed run must find unchanged."""
    return fingerprint_of(encoder, len(tokenizer), tokenizer.model_max_length)


@dataclass(frozen=True)
class Texts:
    """
    What `encode_text` makes of many texts, as it lies in the cache.

    Args:
        places: Where each text is: the number of the part, the first of its tokens there, and how many there are.
        parts: States (tokens, width) of all tokens of some texts, one after another; of the disk, not in memory.
    """

    places: dict[str, tuple[int, int, int]]
    parts: list[np.ndarray]

    def __call__(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """States (texts, tokens, width), 0 beyond the end of each, and their mask; as long as the longest."""
        part, first, count = np.array([self.places[text] for text in texts]).T
        place = np.arange(count.max())
        mask = place < count[:, None]
        states = np.zeros((*mask.shape, self.parts[0].shape[1]), dtype=np.float32)
        for number in np.unique(part):
            here = mask & (part == number)[:, None]
            states[here] = self.parts[number][(first[:, None] + place)[here]]
        return {"text_states": torch.from_numpy(states), "text_mask": torch.from_numpy(mask)}


def cache_folder(tokenizer, encoder) -> Path:
    """Where the encodings of an encoder lie: beside what the datasets library keeps (`HF_DATASETS_CACHE`)."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    words = tokenizer.get_vocab() if fast is None else json.loads(fast.to_str())
    words = {name: value for name, value in words.items() if name not in ("truncation", "padding")}  # of the last call
    key = text_fingerprint(tokenizer, encoder) + json.dumps(words, sort_keys=True)
    return Path(datasets.config.HF_DATASETS_CACHE, "tonefield-captions", hashlib.sha256(key.encode()).hexdigest()[:16])


def read_cache(folder: Path, width: int) -> Texts:
    """What is known already. The files are mapped, not read."""
    places, parts = {}, []
    for file in sorted(folder.glob("*.arrow")):
        with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_file(source) as reader:
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                starts = batch["states"].offsets.to_numpy() // width
                for text, start, end in zip(batch["text"].to_pylist(), starts[:-1].tolist(), starts[1:].tolist(),
                                            strict=True):  # fmt: skip
                    places[text] = len(parts), start, end - start
                parts.append(batch["states"].values.to_numpy().reshape(-1, width))
    return Texts(places, parts)


def encode_texts(tokenizer, encoder, texts: Sequence[str], device: torch.device | str, progress: bool = True) -> Texts:
    """
    Each different text, the empty one too, from the cache, where those that were unknown are added: each is encoded
    once, whichever runs and datasets it comes from. The encoder is on the device only meanwhile.
    """
    folder, width = cache_folder(tokenizer, encoder), encoder.config.d_model
    different = list(dict.fromkeys(["", *texts]))
    known = read_cache(folder, width)
    if missing := [text for text in different if text not in known.places]:
        add_to_cache(folder, tokenizer, encoder, missing, device, progress)
        known = read_cache(folder, width)
    return Texts({text: known.places[text] for text in different}, known.parts)


def add_to_cache(folder: Path, tokenizer, encoder, missing: list[str], device, progress: bool) -> None:
    """Writes a file with the encodings of some texts, under another name until it is complete."""
    width = encoder.config.d_model
    name = hashlib.sha256(json.dumps(missing).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    partial, cut_off = folder / f".{name}.{os.getpid()}", []
    encoder.to(device)
    try:
        with pyarrow.OSFile(str(partial), "wb") as file, pyarrow.ipc.new_file(file, SCHEMA) as writer:
            for start in tqdm(range(0, len(missing), AT_A_TIME), desc="captions", disable=None if progress else True):
                some = missing[start : start + AT_A_TIME]
                states, mask = encode_text(tokenizer, encoder, some, cut_off=cut_off)
                ends = mask.sum(dim=1).cumsum(0).cpu().numpy() * width
                numbers = states[mask].float().cpu().numpy().reshape(-1)
                lists = pyarrow.LargeListArray.from_arrays(np.concatenate([[0], ends]), numbers)
                writer.write_batch(pyarrow.record_batch([pyarrow.array(some, pyarrow.large_string()), lists], SCHEMA))
        partial.replace(folder / f"{name}.arrow")
    finally:
        partial.unlink(missing_ok=True)
        encoder.to("cpu")
    if cut_off:
        logger.warning(
            f"{len(cut_off)} of {len([text for text in missing if text])} different captions are longer than the"
            f" {tokenizer.model_max_length} tokens that the text encoder takes. The first loses {cut_off[0]!r}."
        )


@dataclass(frozen=True)
class ReadTexts:
    """Adds the states of the captions to what another reader makes of the rows."""

    read: Callable[[dict, list[int]], dict]
    column: str
    texts: Texts

    def __call__(self, columns: dict, positions: list[int]) -> dict:
        return self.read(columns, positions) | self.texts([str(text) for text in columns[self.column]])


@dataclass
class ReadTokens:
    """Adds the tokens of the captions to what another reader makes of the rows."""

    read: Callable[[dict, list[int]], dict]
    column: str
    tokenizer: Any
    warned: bool = False

    def __call__(self, columns: dict, positions: list[int]) -> dict:
        captions = [str(text or "") for text in columns[self.column]]
        if not all(text.strip() for text in captions):
            raise UserError(
                f"--caption_column: a row of the stream has no text in {self.column!r}. Give it a caption, or leave"
                " the recording out."
            )
        cut_off = []
        ids, mask = tokenize_text(self.tokenizer, captions, cut_off=cut_off)
        if cut_off and not self.warned:
            self.warned = True
            logger.warning(
                f"A caption is longer than the {self.tokenizer.model_max_length} tokens that the text encoder takes"
                f" and loses {cut_off[0]!r}. There may be others, of which nothing more is said."
            )
        return self.read(columns, positions) | {"text_ids": ids, "text_mask": mask}


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
    """
    Has the readers of a dataset give the states of the captions with each row. Of a stream, whose captions are not
    known beforehand, they give the tokens, for the encoder to encode with each batch; it stays on the device.
    """
    held_out = []
    if data.validation is not None:
        held_out = captions_of(data.validation, args.caption_column, f"the split {args.validation_split!r}")
    if args.streaming:
        texts = encode_texts(tokenizer, encoder, held_out, device, progress)
        data.train.read = ReadTokens(data.read, args.caption_column, tokenizer)
        encoder.to(device)
    else:
        captions = captions_of(data.train.rows, args.caption_column, f"the split {args.train_split!r}")
        texts = encode_texts(tokenizer, encoder, captions + held_out, device, progress)
        data.train.read = ReadTexts(data.read, args.caption_column, texts)
    data.read = ReadTexts(data.read, args.caption_column, texts)
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
