"""Perplexity and comparison on models whose logits are known."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from quantcore.evaluation.perplexity import compare, cut_windows, perplexity

VOCABULARY = 11


class Bigram(nn.Module):
    """Logits of the next token by a table [V, V]; notes the shape of each batch that it reads."""

    def __init__(self, seed: int = 0, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(vocabulary, vocabulary, generator=generator))
        self.read: list[tuple[int, ...]] = []

    def forward(self, ids: Tensor) -> Tensor:
        self.read.append(tuple(ids.shape))
        return self.table[ids]


class Wrapped(Bigram):
    """The same with logits in an object, and its embeddings known, as language models of transformers have them."""

    def forward(self, ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=super().forward(ids))

    def get_input_embeddings(self) -> nn.Embedding:
        return nn.Embedding(VOCABULARY, 1)


def text(length: int) -> list[int]:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(1)).tolist()


def losses(model: Bigram, ids: list[int]) -> Tensor:
    """Negative log-likelihood of each token but the first."""
    log_probabilities = model.table.detach().double().log_softmax(-1)
    return -log_probabilities[torch.tensor(ids[:-1]), torch.tensor(ids[1:])]


# Perplexity


def test_equal_logits_give_the_size_of_the_vocabulary() -> None:
    model = Bigram()
    nn.init.zeros_(model.table)
    assert perplexity(model, text(40), window=8).perplexity == pytest.approx(VOCABULARY)


def test_each_window_is_predicted_on_its_own() -> None:
    model, ids = Bigram(), text(24)
    expected = torch.cat([losses(model, ids[start : start + 8]) for start in (0, 8, 16)]).mean().exp()
    assert perplexity(model, ids, window=8).perplexity == pytest.approx(expected.item())


def test_what_is_left_over_is_a_window_too() -> None:
    model, ids = Bigram(), text(13)
    expected = torch.cat([losses(model, ids[:8]), losses(model, ids[8:])]).mean().exp()
    assert perplexity(model, ids, window=8).perplexity == pytest.approx(expected.item())


def test_a_single_token_left_over_is_not_read() -> None:
    assert perplexity(Bigram(), text(17), window=8).tokens == 16


def test_a_text_shorter_than_a_window_is_read_whole() -> None:
    model, ids = Bigram(), text(5)
    assert perplexity(model, ids, window=8).perplexity == pytest.approx(losses(model, ids).mean().exp().item())


def test_reading_stops_at_max_tokens() -> None:
    model, ids = Bigram(), text(100)
    assert (
        perplexity(model, ids, window=8, max_tokens=16).perplexity == perplexity(model, ids[:16], window=8).perplexity
    )


@pytest.mark.parametrize("batch", [1, 2, 5, 100])
def test_the_batch_size_changes_nothing(batch: int) -> None:
    model, ids = Bigram(), text(43)
    assert perplexity(model, ids, 8, batch=batch).perplexity == pytest.approx(perplexity(model, ids, 8).perplexity)


def test_no_more_than_a_batch_of_windows_is_read_at_once() -> None:
    model = Bigram()
    perplexity(model, text(60), window=8, batch=3)
    assert model.read == [(3, 8), (3, 8), (1, 8), (1, 4)]


def test_logits_may_stand_in_an_object() -> None:
    ids = text(40)
    assert perplexity(Wrapped(), ids, 8).perplexity == perplexity(Bigram(), ids, 8).perplexity


def test_a_tensor_of_ids_is_as_good_as_a_list() -> None:
    ids = text(40)
    assert perplexity(Bigram(), torch.tensor(ids), 8).perplexity == perplexity(Bigram(), ids, 8).perplexity


def test_low_precision_logits_are_summed_in_float32() -> None:
    model, ids = Bigram().bfloat16(), text(2000)
    assert perplexity(model, ids, 2000).perplexity == pytest.approx(losses(model, ids).mean().exp().item(), rel=1e-5)


def test_progress_ends_at_the_number_of_tokens() -> None:
    seen: list[tuple[int, int]] = []
    perplexity(Bigram(), text(29), 8, batch=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(16, 29), (24, 29), (29, 29)]


def test_speed_counts_the_tokens_that_were_read() -> None:
    result = perplexity(Bigram(), text(29), 8)
    assert result.tokens_per_second == pytest.approx(29 / result.seconds)


def test_a_hopeless_model_has_infinite_perplexity() -> None:
    model = Bigram()
    nn.init.zeros_(model.table)
    model.table.data[:, 0] = 1e4
    assert perplexity(model, [1, 2, 3, 4]).perplexity == math.inf


def test_nan_logits_are_not_hidden() -> None:
    model = Bigram()
    nn.init.constant_(model.table, math.nan)
    assert math.isnan(perplexity(model, text(10)).perplexity)


@pytest.mark.parametrize("ids", [[], [3]], ids=["empty", "one token"])
def test_a_text_of_less_than_two_tokens_is_refused(ids: list[int]) -> None:
    with pytest.raises(ValueError, match=f"at least 2 tokens, got {len(ids)}"):
        perplexity(Bigram(), ids)


class Clamped(Bigram):
    """Reads any id."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids.clamp(max=VOCABULARY - 1))


@pytest.mark.parametrize("model_class", [Clamped, Wrapped], ids=["by its logits", "by its embeddings"])
def test_ids_outside_of_the_vocabulary_are_refused(model_class: type[Bigram]) -> None:
    with pytest.raises(ValueError, match="token id 11 is outside of the model's vocabulary of 11"):
        perplexity(model_class(), [1, 11, 2])


@pytest.mark.parametrize("option", ["window", "max_tokens", "batch"])
def test_options_that_leave_nothing_to_read_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be at least"):
        perplexity(Bigram(), text(10), **{option: 0})


def test_a_model_without_logits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Identity: expected logits \[1, 5, V\], got \[1, 5\]"):
        perplexity(nn.Identity(), text(5))


def test_cut_windows_keeps_the_order_of_the_text() -> None:
    windows = cut_windows(list(range(21)), window=4, max_tokens=100, batch=2)
    assert torch.cat([ids.flatten() for ids in windows]).tolist() == list(range(20))


# Comparison


def test_a_model_is_at_no_distance_from_itself() -> None:
    result = compare(Bigram(), Bigram(), text(40), window=8)
    assert (result.kl_divergence, result.top1_agreement) == (0.0, 1.0)


def test_divergence_is_that_of_the_reference_from_the_model() -> None:
    model, reference, ids = Bigram(0), Bigram(5), text(8)
    ours, theirs = (
        table.detach().double().log_softmax(-1)[torch.tensor(ids[:-1])] for table in (model.table, reference.table)
    )
    expected = (theirs.exp() * (theirs - ours)).sum(-1).mean().item()
    assert compare(model, reference, ids).kl_divergence == pytest.approx(expected, rel=1e-5)


def test_agreement_is_the_share_of_equal_first_choices() -> None:
    model, reference = Bigram(), Bigram()
    reference.table.data[3] = reference.table.data[3].flip(0)
    ids = [3, 1, 3, 2, 4]  # of the four tokens that are predicted from, two are a 3
    assert compare(model, reference, ids).top1_agreement == 0.5


def test_both_perplexities_are_those_of_each_alone() -> None:
    model, reference, ids = Bigram(0), Bigram(5), text(43)
    result = compare(model, reference, ids, window=8)
    assert result.model.perplexity == perplexity(model, ids, window=8).perplexity
    assert result.reference.perplexity == perplexity(reference, ids, window=8).perplexity


def test_vocabularies_of_different_size_are_refused() -> None:
    with pytest.raises(ValueError, match="the model predicts 11 tokens, the reference 12"):
        compare(Bigram(), Bigram(vocabulary=12), text(10))
