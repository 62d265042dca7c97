# pyright: reportOptionalCall=false
"""The transformer of score-entropy discrete diffusion: how likely each symbol is, given the other tokens."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn


# Sizes by name, those of the original (https://huggingface.co/papers/2310.16834) and of MDLM (2406.07524, tiny).
PRESETS = {
    "tiny": dict(hidden_size=512, num_layers=8, num_heads=8),
    "small": dict(hidden_size=768, num_layers=12, num_heads=12),
    "medium": dict(hidden_size=1024, num_layers=24, num_heads=16),
}

# What the head says of a symbol that cannot stand at a position. Not -inf, so that differences remain numbers.
ILLEGAL = -1e9


@dataclass
class SEDDTransformer1DOutput(BaseOutput):
    """
    Output of [`SEDDTransformer1DModel`].

    Args:
        sample (`torch.Tensor` of shape `(*tokens.shape, vocab_size)`):
            Raw logits (log-scores) over the real symbols, float32.
    """

    sample: torch.Tensor


def noise_features(sigma: torch.Tensor, size: int = 256) -> torch.Tensor:
    """cos(sigma w_k) and sin(sigma w_k), w_k = 10000^(-2k / size): (batch,) -> (batch, size)."""
    frequencies = torch.exp(-math.log(10000) * 2 / size * torch.arange(size // 2, device=sigma.device))
    angles = sigma.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def rotary_angles(positions: torch.Tensor, size: int) -> torch.Tensor:
    """Angles position * 10000^(-2k / size), twice in a row: (length,) -> (length, size)."""
    frequencies = 10000 ** (-torch.arange(0, size, 2, device=positions.device) / size)
    return (positions.float()[:, None] * frequencies).repeat(1, 2)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (https://huggingface.co/papers/2104.09864, equation 34), element k with k + size/2."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * (1 + scale) + shift


class SEDDTransformerBlock(nn.Module):
    """Attention, text if there is any, and a perceptron, each added to a stream and modulated by the condition."""

    def __init__(self, hidden_size: int, num_heads: int, cond_dim: int, dropout: float, text_dim: int | None):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.norm1 = nn.LayerNorm(hidden_size, bias=False)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.attention_out = nn.Linear(hidden_size, hidden_size, bias=False)
        if text_dim is not None:
            self.norm_text = nn.LayerNorm(hidden_size, bias=False)
            self.text_q = nn.Linear(hidden_size, hidden_size, bias=False)
            self.text_kv = nn.Linear(text_dim, 2 * hidden_size, bias=False)
            self.text_out = nn.Linear(hidden_size, hidden_size, bias=False)
            nn.init.zeros_(self.text_out.weight)
        self.norm2 = nn.LayerNorm(hidden_size, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * hidden_size, hidden_size),
        )
        self.modulation = nn.Linear(cond_dim, 6 * hidden_size)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(
        self,
        x: torch.Tensor,
        condition: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor | None,
        text: torch.Tensor | None,
        text_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        q, k, v = map(self.heads, self.qkv(modulate(self.norm1(x), shift1, scale1)).chunk(3, dim=-1))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attention = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        x = x + gate1 * F.dropout(self.attention_out(attention), self.dropout, self.training)
        if text is not None:
            q, (k, v) = (
                self.heads(self.text_q(self.norm_text(x))),
                map(self.heads, self.text_kv(text).chunk(2, dim=-1)),
            )
            attention = F.scaled_dot_product_attention(q, k, v, text_mask).transpose(1, 2).flatten(2)
            x = x + F.dropout(self.text_out(attention), self.dropout, self.training)
        return x + gate2 * F.dropout(self.mlp(modulate(self.norm2(x), shift2, scale2)), self.dropout, self.training)


class SEDDTransformer1DModel(ModelMixin, ConfigMixin):
    r"""
    A bidirectional transformer over tokens with rotary positions, modulated by the noise level and a class (DiT), of
    score-entropy discrete diffusion (https://huggingface.co/papers/2310.16834).

    A fresh network is the identity with an output of zero. The head and all that follows are float32 whatever the
    precision of the rest is.

    Nothing given is the null condition that guidance starts from: the class `num_classes` (one more than there are
    labels) stands for no label, a text whose mask is False everywhere for no text. Training puts them in the place of
    what it drops, and `class_labels=None` and `encoder_hidden_states=None` mean them.

    Args:
        vocab_size (`int`): Number of real symbols that a token can be, N.
        graph_type (`"absorb"` or `"uniform"`): Whether a mask, the symbol N, is among the symbols that come in.
        hidden_size, num_layers, num_heads (`int`): Width, blocks, attention heads of each.
        cond_dim (`int`): Width of the embedding of noise level and class.
        dropout (`float`): On what each block adds, while training.
        time_conditioning (`bool`):
            Whether the network is told the noise level. With the absorbing graph it need not be: what a masked token
            is likely to be depends on the others alone (https://huggingface.co/papers/2406.03736).
        num_classes (`int`, *optional*): Number of labels, without the null class.
        text_dim (`int`, *optional*): Width of the hidden states of a text encoder, for cross-attention.
        num_codebooks (`int`): Number of tokens per frame.
        layout (`"parallel"`, `"flatten"` or `"codebook_major"`):
            How several codebooks of a codec come in. `"parallel"`: `(batch, codebooks, frames)`, each with its own
            embedding and head. `"flatten"` (all of a frame, then the next) and `"codebook_major"` (all of a codebook,
            then the next): `(batch, codebooks * frames)`, where codebook k has the k-th share of the `vocab_size`
            symbols, and only these at its positions.
        max_length (`int`, *optional*): The most frames that the network has seen in training.
        scaled_by_sigma (`bool`):
            False for a network of the absorbing graph whose head gives ln s itself. To that ln((e^sigma - 1) N) is
            added, so that the output f stands for the score s = e^f / ((e^sigma - 1) N), as it does otherwise.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["SEDDTransformerBlock"]  # noqa: RUF012
    _repeated_blocks = ["SEDDTransformerBlock"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 4096,
        graph_type: str = "absorb",
        hidden_size: int = 512,
        num_layers: int = 8,
        num_heads: int = 8,
        cond_dim: int = 128,
        dropout: float = 0.1,
        time_conditioning: bool = False,
        num_classes: int | None = None,
        text_dim: int | None = None,
        num_codebooks: int = 1,
        layout: str = "parallel",
        max_length: int | None = None,
        scaled_by_sigma: bool = True,
    ):
        super().__init__()
        if graph_type not in ("absorb", "uniform"):
            raise ValueError(f"graph_type is 'absorb' or 'uniform', not {graph_type!r}.")
        if layout not in ("parallel", "flatten", "codebook_major"):
            raise ValueError(f"layout is 'parallel', 'flatten' or 'codebook_major', not {layout!r}.")
        if not scaled_by_sigma and (graph_type != "absorb" or not time_conditioning):
            raise ValueError("scaled_by_sigma=False is for the absorbing graph and time_conditioning=True.")
        if hidden_size % (2 * num_heads):
            raise ValueError(f"hidden_size {hidden_size} must be a multiple of 2 * num_heads = {2 * num_heads}.")
        self.in_sequence = layout != "parallel" and num_codebooks > 1
        if self.in_sequence and graph_type == "uniform":
            raise ValueError(f"The uniform graph makes any symbol of any other, which layout {layout!r} forbids.")
        if self.in_sequence and vocab_size % num_codebooks:
            raise ValueError(f"vocab_size {vocab_size} must be a multiple of num_codebooks = {num_codebooks}.")
        # Tables for each codebook of the parallel layout, one after the other
        self.tables = 1 if self.in_sequence else num_codebooks
        self.num_symbols = vocab_size + (graph_type == "absorb")
        self.token_embedding = nn.Embedding(self.tables * self.num_symbols, hidden_size)
        nn.init.kaiming_uniform_(self.token_embedding.weight, a=math.sqrt(5))
        if self.in_sequence:
            self.codebook_embedding = nn.Embedding(num_codebooks, hidden_size)
            nn.init.kaiming_uniform_(self.codebook_embedding.weight, a=math.sqrt(5))
        self.noise_embedding = nn.Sequential(nn.Linear(256, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))
        if num_classes is not None:
            self.class_embedding = nn.Embedding(num_classes + 1, cond_dim)
        if text_dim is not None:
            self.null_text = nn.Parameter(torch.randn(1, 1, text_dim))
            self.text_norm = nn.LayerNorm(text_dim)
        self.blocks = nn.ModuleList(
            SEDDTransformerBlock(hidden_size, num_heads, cond_dim, dropout, text_dim) for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(hidden_size, bias=False)
        self.modulation_out = nn.Linear(cond_dim, 2 * hidden_size)
        self.head = nn.Linear(hidden_size, self.tables * self.num_symbols)
        for layer in [*(block.modulation for block in self.blocks), self.modulation_out, self.head]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.gradient_checkpointing = False

    @classmethod
    def from_preset(cls, name: str, **arguments) -> "SEDDTransformer1DModel":
        """A network by the name of its size (see `PRESETS`): `from_preset("tiny", vocab_size=1024)`."""
        if name not in PRESETS:
            raise ValueError(f"There is no transformer preset {name!r}; the presets are {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **arguments})

    def _condition(
        self, batch_size: int, timestep: torch.Tensor | None, class_labels: torch.Tensor | None
    ) -> torch.Tensor:
        device, c = self.head.weight.device, self.config
        if not c.time_conditioning:
            timestep = torch.zeros(1, device=device)
        elif timestep is None:
            raise ValueError("timestep is missing: this network is told the noise level (time_conditioning=True).")
        condition = self.noise_embedding(noise_features(timestep.reshape(-1)).to(self.dtype)).expand(batch_size, -1)
        if c.num_classes is not None:
            if class_labels is None:
                class_labels = torch.full((1,), c.num_classes, device=device)
            condition = condition + self.class_embedding(class_labels.reshape(-1))
        elif class_labels is not None:
            raise ValueError("class_labels are given, but this network has no classes: leave them out.")
        return F.silu(condition)

    def _text(
        self, batch_size: int, states: torch.Tensor | None, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The states to attend to and where they are: the null text, which is always there, then those given."""
        if self.config.text_dim is None:
            if states is not None:
                raise ValueError("encoder_hidden_states are given, but this network reads no text: leave them out.")
            return None, None
        text = self.null_text.expand(batch_size, -1, -1)
        if states is None:
            return text, None
        text = torch.cat([text, self.text_norm(states.to(text.dtype))], dim=1)
        if mask is not None:
            mask = F.pad(mask.bool(), (1, 0), value=True)[:, None, None]
        return text, mask

    def forward(
        self,
        tokens: torch.Tensor,
        timestep: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> SEDDTransformer1DOutput | tuple[torch.Tensor]:
        r"""
        Args:
            tokens (`torch.Tensor` of shape `(batch_size, length)` or `(batch_size, num_codebooks, length)`): As the
                layout has them.
            timestep (`torch.Tensor` of shape `(batch_size,)`, *optional*): The total noise sigma.
            class_labels (`torch.Tensor` of shape `(batch_size,)`, *optional*): `num_classes` is the null class.
            encoder_hidden_states (`torch.Tensor` of shape `(batch_size, words, text_dim)`, *optional*): Text.
            encoder_attention_mask (`torch.Tensor` of shape `(batch_size, words)`, *optional*): True at words.
            attention_mask (`torch.Tensor` of shape `(batch_size, length)`, *optional*): False at padding.
            positions (`torch.Tensor` of shape `(batch_size, count)`, *optional*):
                Where the output is wanted, as indices into the flattened tokens of a sample. The head is computed
                there alone, and the output is of shape `(batch_size, count, vocab_size)`.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a [`SEDDTransformer1DOutput`].
        """
        c = self.config
        batch_size, length = tokens.shape[0], tokens.shape[-1]
        place = torch.arange(length, device=tokens.device)
        if self.tables > 1:
            offsets = self.num_symbols * torch.arange(self.tables, device=tokens.device)
            x = self.token_embedding(tokens + offsets[:, None]).sum(dim=1)
        else:
            x = self.token_embedding(tokens.reshape(batch_size, length))
        codebook = None
        if self.in_sequence:
            flatten, frames = c.layout == "flatten", length // c.num_codebooks
            codebook = place % c.num_codebooks if flatten else place // frames
            place = place // c.num_codebooks if flatten else place % frames
            x = x + self.codebook_embedding(codebook)

        condition = self._condition(batch_size, timestep, class_labels)
        text, text_mask = self._text(batch_size, encoder_hidden_states, encoder_attention_mask)
        angles = rotary_angles(place, c.hidden_size // c.num_heads)
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None]
        arguments = (condition, angles.cos(), angles.sin(), mask, text, text_mask)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, *arguments)
            else:
                x = block(x, *arguments)
        logits = self._logits(x, condition, positions, codebook)
        if not c.scaled_by_sigma and timestep is not None:
            scale = torch.log(torch.expm1(timestep.float())) + math.log(c.vocab_size)
            logits = logits + scale.reshape(-1, 1, 1)
        if tokens.ndim == 3 and positions is None:
            logits = logits.reshape(*tokens.shape, c.vocab_size)
        return SEDDTransformer1DOutput(logits) if return_dict else (logits,)

    def _logits(
        self, x: torch.Tensor, condition: torch.Tensor, positions: torch.Tensor | None, codebook: torch.Tensor | None
    ) -> torch.Tensor:
        """Logits at all positions, (batch, tables * length, vocab_size), or at some."""
        length, tables, n = x.shape[1], self.tables, self.config.vocab_size
        # With several heads per frame, as many positions as there are frames are no fewer than all.
        few = positions is not None and (tables == 1 or positions.shape[1] < length)
        here = positions if few else None
        if here is not None:
            x = x.gather(1, (here % length)[..., None].expand(-1, -1, x.shape[2]))
        shift, scale = self.modulation_out(condition)[:, None].chunk(2, dim=-1)
        x = modulate(self.norm_out(x), shift, scale)
        # The mask is no symbol that a token can be: its row of the head, which the original has, is left out.
        weight = self.head.weight.unflatten(0, (tables, -1))[:, :n].flatten(0, 1)
        bias = self.head.bias.unflatten(0, (tables, -1))[:, :n].flatten()
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), weight.float(), bias.float()).unflatten(-1, (tables, n))
        if here is not None:
            row = (here // length)[..., None, None].expand(-1, -1, 1, n)
            logits = logits.gather(2, row)[:, :, 0] if tables > 1 else logits[:, :, 0]
        else:
            logits = logits.transpose(1, 2).flatten(1, 2)
            if positions is not None:
                logits = logits.gather(1, positions[..., None].expand(-1, -1, n))
        if codebook is not None:
            owner = torch.arange(n, device=x.device) // (n // self.config.num_codebooks)
            codebook = codebook[None, :, None] if positions is None else codebook[positions][..., None]
            logits = logits.masked_fill(owner != codebook, ILLEGAL)
        return logits
