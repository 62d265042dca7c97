"""Transformers that are exactly what a perfectly trained one would be, for known laws of tokens, and random ones."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from exact_networks import quiet

from tonefield import MuLawTokenizer, ScoreEntropyScheduler, SEDDTokenPipeline, SEDDTransformer1DModel
from tonefield.models.transformer_sedd import SEDDTransformer1DOutput


class ExactTransformer(ModelMixin, ConfigMixin):
    """What the law of a clean token is, given those that are not masked; subclasses say for which law."""

    calls = 0

    def laws(self, tokens, class_labels):
        """(batch, sites) -> (batch, sites, vocab_size)"""
        raise NotImplementedError

    def forward(self, tokens, timestep, class_labels=None, positions=None):
        self.calls += 1
        assert timestep.shape == (len(tokens),)
        laws = self.laws(tokens.flatten(1), class_labels)
        if positions is not None:
            return SEDDTransformer1DOutput(laws.gather(1, positions[..., None].expand(-1, -1, laws.shape[2])).log())
        return SEDDTransformer1DOutput(laws.log().reshape(*tokens.shape, -1))


class TableTransformer(ExactTransformer):
    """Any law of short sequences: the probability of each, one row per class; the null class is their mixture."""

    @register_to_config
    def __init__(
        self, vocab_size, num_codebooks=1, layout="parallel", num_classes=None, max_length=None, graph_type="absorb"
    ):
        super().__init__()

    def laws(self, tokens, class_labels):
        n, sites = self.config.vocab_size, tokens.shape[1]
        table = torch.cat([self.table, self.table.mean(0, keepdim=True)])
        weights = table[torch.zeros(len(tokens), dtype=torch.long) if class_labels is None else class_labels]
        for site in range(sites):  # (batch, all sequences) -> the consistent ones
            symbol = torch.arange(n**sites) // n ** (sites - 1 - site) % n
            token = tokens[:, site, None]
            weights = weights * ((token == n) | (token == symbol))
        joint = weights.reshape(len(tokens), *[n] * sites)
        laws = [joint.movedim(site + 1, 1).reshape(len(tokens), n, -1).sum(2) for site in range(sites)]
        return torch.stack(laws, 1) / weights.sum(1)[:, None, None]


class MarkovTransformer(ExactTransformer):
    """A stationary Markov chain, of any length."""

    @register_to_config
    def __init__(self, vocab_size, max_length=None, num_codebooks=1, num_classes=None, graph_type="absorb"):
        super().__init__()

    def laws(self, tokens, class_labels):
        n, length = self.config.vocab_size, tokens.shape[1]
        seen = torch.cat([torch.eye(n), torch.ones(1, n)]).double()[tokens]
        forward, backward = [self.start.expand(len(tokens), n)], [torch.ones(len(tokens), n).double()]
        for i in range(length - 1):
            forward.append((forward[-1] * seen[:, i]) @ self.transition)
            backward.append((backward[-1] * seen[:, length - 1 - i]) @ self.transition.T)
            forward[-1] /= forward[-1].sum(1, keepdim=True)
            backward[-1] /= backward[-1].sum(1, keepdim=True)
        laws = torch.stack(forward, 1) * torch.stack(backward[::-1], 1) * seen
        return laws / laws.sum(2, keepdim=True)


def exact_table(table, vocab_size, **config):
    """`table` has one row of `vocab_size ** sites` probabilities for each class."""
    transformer = TableTransformer(vocab_size, **config)
    transformer.register_buffer("table", table.double())
    return transformer


def random_table(vocab_size, sites, classes=1):
    table = torch.rand(classes, vocab_size**sites, generator=torch.Generator().manual_seed(0)).double() ** 2 + 0.05
    return table / table.sum(1, keepdim=True)


def lazy_walk(vocab_size, **config):
    """A chain that stays, or moves by one."""
    steps = (torch.arange(vocab_size)[:, None] - torch.arange(vocab_size)).abs()
    weights = torch.where(steps == 0, 1.0, torch.where(steps == 1, 2.0, 0.0)).double()
    transformer = MarkovTransformer(vocab_size, **config)
    transformer.register_buffer("transition", weights / weights.sum(1, keepdim=True))
    transformer.register_buffer("start", weights.sum(1) / weights.sum())  # as weights are symmetric
    return transformer


def random_token_pipe(hop=4, layout="parallel", seed=0, **config):
    """A network of random weights on the samples of a waveform, `hop` codebooks of 256 codes."""
    torch.manual_seed(seed)
    symbols = 256 * (1 if layout == "parallel" else hop)
    config = dict(num_codebooks=hop, layout=layout, max_length=64) | config
    transformer = SEDDTransformer1DModel(symbols, hidden_size=16, num_layers=1, num_heads=2, cond_dim=8, **config)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    scheduler = ScoreEntropyScheduler(vocab_size=symbols, graph_type=transformer.config.graph_type)
    return quiet(SEDDTokenPipeline(transformer.eval(), scheduler, MuLawTokenizer(8000, hop)))
