"""Layouts against the places and symbols that their table names, one by one."""

import itertools

import pytest
import torch

from tonefield.models.token_layouts import (
    LAYOUTS,
    apply_layout,
    legal_symbols,
    token_places,
    undo_layout,
    vocabulary_size,
)


SHAPES = [(layout, K, F) for layout, K, F in itertools.product(LAYOUTS, (1, 2, 5), (1, 2, 7))
          if K == 1 or layout != "single"]  # fmt: skip


def by_hand(codes, layout, size):
    """The tokens, code by code, as the table has it."""
    B, K, F = codes.shape
    shape = {"single": (B, F), "parallel": (B, K, F), "delay": (B, K, F + K - 1)}.get(layout, (B, K * F))
    tokens = torch.full(shape, size)
    for b, k, f in itertools.product(range(B), range(K), range(F)):
        code = codes[b, k, f]
        if layout == "flatten":
            tokens[b, f * K + k] = k * size + code
        elif layout == "codebook_major":
            tokens[b, k * F + f] = k * size + code
        elif layout == "single":
            tokens[b, f] = code
        else:
            tokens[b, k, f + k * (layout == "delay")] = code
    return tokens


@pytest.mark.parametrize(("layout", "K", "F"), SHAPES)
def test_tokens_are_where_the_table_says_and_come_back(layout, K, F):
    codes = torch.randint(0, 11, (3, K, F), generator=torch.Generator().manual_seed(0))
    codes[0], codes[1] = 0, 10  # the first code and the last one
    tokens = apply_layout(codes, layout, 11)
    assert torch.equal(tokens, by_hand(codes, layout, 11))
    assert torch.equal(undo_layout(tokens, layout, K, 11), codes)
    assert tokens.max() < vocabulary_size(layout, K, 11)


@pytest.mark.parametrize(("layout", "K", "F"), SHAPES)
def test_legal_is_what_some_codes_lead_to(layout, K, F):
    codes = torch.arange(4)[:, None, None].expand(-1, K, F)  # each code once at each place
    tokens = apply_layout(codes, layout, 4)
    reached = torch.nn.functional.one_hot(tokens, vocabulary_size(layout, K, 4)).bool().any(0)
    assert torch.equal(legal_symbols(layout, K, 4, F), reached)


@pytest.mark.parametrize(("layout", "K", "F"), SHAPES)
def test_places(layout, K, F):
    frames, books = token_places(layout, K, F)
    number = torch.arange(K * F).view(1, K, F)  # a code that tells its place
    tokens = apply_layout(number, layout, K * F)[0]
    inside = (frames >= 0) & (frames < F)
    assert torch.equal((tokens % (K * F))[inside], (books * F + frames)[inside])
    assert frames.shape == books.shape == tokens.shape
    assert (~inside).sum() == (K * (K - 1) if layout == "delay" else 0)


def test_what_is_no_code_is_refused():
    with pytest.raises(ValueError, match=r"Codes lie in 0\.\.4095; 4096 at \[0, 0, 1\] does not"):
        apply_layout(torch.tensor([[[0, 4096]]]), "single", 4096)
    with pytest.raises(ValueError, match=r"lie in 0\.\.4095; 4096 at \[0, 0, 1\]"):  # a mask that was left
        undo_layout(torch.tensor([[0, 4096]]), "single", 1, 4096)
    with pytest.raises(ValueError, match=r"lie in 0\.\.9; -10 at \[0, 1, 0\]"):  # a symbol of the other codebook
        undo_layout(torch.tensor([[3, 0]]), "flatten", 2, 10)
    with pytest.raises(ValueError, match=r"lie in 0\.\.9; 10 at \[0, 0, 1\]"):
        undo_layout(torch.tensor([[3, 10, 12, 15]]), "codebook_major", 2, 10)
    with pytest.raises(ValueError, match="Delayed tokens have the pad 10"):
        undo_layout(torch.tensor([[[1, 2, 3], [10, 1, 2]]]), "delay", 2, 10)
    with pytest.raises(ValueError, match="2 columns are too few for 4"):
        undo_layout(torch.zeros(1, 4, 2, dtype=torch.long), "delay", 4, 10)


def test_wrong_shapes_and_names_are_refused():
    codes = torch.zeros(1, 2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="no layout 'flat'; the layouts are single, flatten"):
        apply_layout(codes, "flat", 4)
    with pytest.raises(ValueError, match="'single' is for one codebook, not for 2: use 'parallel'"):
        apply_layout(codes, "single", 4)
    with pytest.raises(ValueError, match=r"\(batch, codebooks, frames\), not \(2, 3\)"):
        apply_layout(codes[0], "flatten", 4)
    with pytest.raises(ValueError, match=r"divisible by 2, not \(1, 3\)"):
        undo_layout(codes[:, 0], "flatten", 2, 4)
    with pytest.raises(ValueError, match=r"\(batch, 3, length\), not \(1, 2, 3\)"):
        undo_layout(codes, "parallel", 3, 4)
