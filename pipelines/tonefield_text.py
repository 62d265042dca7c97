"""Text as a network reads it: the same function in training and in the pipelines.

This file travels with the pipelines, hence no import of tonefield, and a name that nobody else uses: diffusers puts
the files of all local repositories into one package.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import logging


logger = logging.get_logger(__name__)


def tokenize_text(
    tokenizer: Any, prompts: str | Sequence[str], max_length: int | None = None, cut_off: list[str] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The first half of [`encode_text`], which explains the arguments.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Numbers of tokens of shape `(prompts, tokens)`, and their boolean mask.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"prompts is {prompts!r}: give a text, or a list of at least one text.")
    limit = max_length or tokenizer.model_max_length
    if limit > 10**9:  # what transformers says where there is no limit
        limit = None
    complete = tokenizer(prompts, verbose=False).input_ids
    tokens = tokenizer(prompts, padding="longest", truncation=limit is not None, max_length=limit, return_tensors="pt")
    for prompt, every, kept in zip(prompts, complete, tokens.attention_mask.sum(1).tolist(), strict=True):
        if kept == 0:
            raise ValueError(f"the tokenizer makes nothing of {prompt!r}: it must append an end token, as T5's do.")
        if len(every) > kept:
            rest = tokenizer.decode(every[kept - 1 :], skip_special_tokens=True)  # the end token takes a place
            if cut_off is None:
                logger.warning(f"The text encoder takes {limit} tokens; this part of a prompt is cut off: {rest!r}")
            else:
                cut_off.append(rest)
    return tokens.input_ids, tokens.attention_mask.bool()


@torch.no_grad()
def encode_tokens(text_encoder: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The second half of [`encode_text`]: the last hidden states, 0 where there is no token."""
    states = text_encoder(ids, attention_mask=mask.to(ids.dtype)).last_hidden_state
    return states * mask[..., None].to(states.dtype)


def encode_text(
    tokenizer: Any,
    text_encoder: Any,
    prompts: str | Sequence[str],
    device: torch.device | str | None = None,
    max_length: int | None = None,
    cut_off: list[str] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The last hidden states of a text encoder for all tokens of each prompt.

    Rows are as long as the longest prompt; what is beyond the end of a prompt is masked, and 0. The empty prompt, the
    null of guidance, has the end token alone. Of a prompt that is too long the beginning is encoded, with a warning
    that shows the rest.

    Args:
        tokenizer ([`T5Tokenizer`]): Any tokenizer of transformers that appends an end token.
        text_encoder ([`T5EncoderModel`]): Any model that is called as `text_encoder(ids, attention_mask=...)`.
        prompts (`str` or `list[str]`): One or several.
        device (`torch.device` or `str`, *optional*): Where to encode; where the encoder is by default.
        max_length (`int`, *optional*): Most tokens of a prompt, the end included; what the tokenizer says by default.
        cut_off (`list[str]`, *optional*): Receives what is cut off, in the place of the warnings.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: States of shape `(prompts, tokens, width)`, and a boolean mask of shape
        `(prompts, tokens)`, true for tokens.
    """
    ids, mask = tokenize_text(tokenizer, prompts, max_length, cut_off)
    device = text_encoder.device if device is None else device
    ids, mask = ids.to(device), mask.to(device)
    return encode_tokens(text_encoder, ids, mask), mask


@dataclass
class TokenStates:
    """What the network reads: states (branches, batch, tokens, width), and the mask of the tokens."""

    states: torch.Tensor
    mask: torch.Tensor


def join_text(
    branches: list[tuple[torch.Tensor, torch.Tensor]], num_prompts: int, num_waveforms: int
) -> TokenStates | None:
    """Branches of states and masks, brought to one length, with a row for each of the sounds."""
    if not branches:
        return None
    length = max(states.shape[1] for states, _ in branches)

    def for_each(rows: torch.Tensor) -> torch.Tensor:
        padding = [0, 0] * (rows.ndim - 2) + [0, length - rows.shape[1]]
        rows = torch.nn.functional.pad(rows, padding)
        return rows.expand(num_prompts, *rows.shape[1:]).repeat_interleave(num_waveforms, 0)

    return TokenStates(
        torch.stack([for_each(states) for states, _ in branches]),
        torch.stack([for_each(mask) for _, mask in branches]),
    )
