"""An edit acts where it was told to, and a position means the same with a cache, without one, and behind padding."""

from __future__ import annotations

import pytest
import torch
from interventions.models import TOKENS, Case, D, make_sae
from torch import Tensor

import saekit
from saekit import UsageError
from saekit.activations.sites import resolve

WIDTH = TOKENS.shape[1]
MASK = torch.rand(TOKENS.shape, generator=torch.Generator().manual_seed(5)) < 0.3
FORMS = {
    "one": (4, [4]),
    "list": ([2, 5, 9], [2, 5, 9]),
    "tensor": (torch.tensor([2, 5]), [2, 5]),
    "range": (range(3, 6), [3, 4, 5]),
    "negative": ([-1, 3], [3, WIDTH - 1]),
    "slice": (slice(4, 8), [4, 5, 6, 7]),
    "from": (slice(9, None), [9, 10, 11]),
    "step": (slice(1, None, 4), [1, 5, 9]),
    "last": (slice(-2, None), [10, 11]),
    "without_ends": (slice(-100, -8), [0, 1, 2, 3]),
    "function": (lambda p: p % 5 == 0, [0, 5, 10]),
    "mask": (MASK, MASK),
}


def expected_mask(which) -> Tensor:
    if isinstance(which, Tensor):
        return which
    mask = torch.zeros(TOKENS.shape, dtype=torch.bool)
    mask[:, which] = True
    return mask


@pytest.mark.parametrize("name", FORMS)
def test_only_the_chosen_positions_change_and_what_is_causally_above(case: Case, name: str) -> None:
    positions, which = FORMS[name]
    mask = expected_mask(which)
    sae = make_sae("topk", case.activation(case.middle))
    middle, above = resolve(case.model, case.middle), resolve(case.model, case.above)
    with middle.capture() as plain_middle, above.capture() as plain_above:
        plain = case.logits()
    with (
        saekit.attach(case.model, sae, case.middle, edits={3: saekit.add(2.0)}, positions=positions) as attached,
        middle.capture() as seen_middle,
        above.capture() as seen_above,
    ):
        changed = case.logits()
    assert attached.changed == mask.sum()
    torch.testing.assert_close(seen_middle.value[mask], plain_middle.value[mask] + 2.0 * sae.W_dec[3])
    assert torch.equal(seen_middle.value[~mask], plain_middle.value[~mask])
    downstream = mask.cumsum(1) > 0  # the chosen positions and what follows them in their row
    for ours, theirs in ((seen_above.value, plain_above.value), (changed, plain)):
        assert torch.equal(ours[~downstream], theirs[~downstream])
        assert bool((ours[downstream] != theirs[downstream]).any(-1).all())


def test_no_change_at_some_positions(case: Case) -> None:
    sae = make_sae("topk", case.activation(case.middle))
    x = case.activation(case.middle)
    with (
        saekit.attach(case.model, sae, case.middle, mode="no_change", positions=slice(3, 5)),
        resolve(case.model, case.middle).capture() as seen,
    ):
        case.logits()
    rebuilt = sae(x[:, 3:5].reshape(-1, D)).view(2, 2, D)
    assert torch.equal(seen.value[:, 3:5], rebuilt)
    assert torch.equal(seen.value[:, :3], x[:, :3]) and torch.equal(seen.value[:, 5:], x[:, 5:])


def padded(left: bool) -> tuple[Tensor, Tensor]:
    """Rows of 12 and of 8 tokens, the second padded."""
    mask = torch.ones_like(TOKENS)
    if left:
        mask[1, :4] = 0
    else:
        mask[1, 8:] = 0
    return TOKENS * mask + (1 - mask), mask


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("positions", [[0, 3], slice(2, 6), slice(-2, None), [-9, -1], lambda p: p < 3])
def test_padding_does_not_shift_a_position(language: Case, left: bool, positions) -> None:
    tokens, mask = padded(left)
    sae = make_sae("topk", language.activation(language.middle))
    with (
        saekit.attach(language.model, sae, language.middle, edits={3: saekit.add(2.0)}, positions=positions),
        resolve(language.model, language.middle).capture() as together,
    ):
        language.model(tokens, attention_mask=mask)
    with (
        saekit.attach(language.model, sae, language.middle, edits={3: saekit.add(2.0)}, positions=positions),
        resolve(language.model, language.middle).capture() as alone,
    ):
        language.model(tokens[1:][mask[1:].bool()][None])
    with resolve(language.model, language.middle).capture() as plain:
        language.model(tokens, attention_mask=mask)
    changed = (together.value != plain.value).any(-1)
    assert not changed[~mask.bool()].any()
    assert changed.any(1).all()
    if language.model.config.model_type != "gpt2" or not left:  # GPT-2 numbers positions by column unless told
        torch.testing.assert_close(together.value[1][mask[1].bool()], alone.value[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunks", [[12], [8, 1, 1, 1, 1], [1] * 12, [5, 4, 3]])
@pytest.mark.parametrize("name", ["one", "list", "slice", "from", "step", "function", "mask"])
def test_a_text_in_pieces_is_edited_like_the_whole(language: Case, name: str, chunks: list[int]) -> None:
    positions, which = FORMS[name]
    sae = make_sae("topk", language.activation(language.middle))
    settings = {"edits": {3: saekit.add(2.0)}, "positions": positions, "record": True}
    with saekit.attach(language.model, sae, language.middle, **settings) as attached:
        whole = language.logits()
        assert len(attached.codes) == 1
    if name == "mask":  # a mask is of the prompt
        chunks = [12]
    with saekit.attach(language.model, sae, language.middle, **settings) as attached:
        pieces, cache = [], None
        for piece in TOKENS.split(chunks, dim=1):
            output = language.model(piece, past_key_values=cache, use_cache=True)
            pieces.append(output.logits)
            cache = output.past_key_values
        assert [len(code) for code in attached.codes] == [2 * n for n in chunks]
        assert attached.changed == expected_mask(which).sum()
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)


def test_a_mask_of_the_prompt_leaves_what_follows_alone(language: Case) -> None:
    sae = make_sae("topk", language.activation(language.middle))
    with saekit.attach(
        language.model, sae, language.middle, edits={3: saekit.add(2.0)}, positions=MASK[:, :8]
    ) as attached:
        output = language.model(TOKENS[:, :8], use_cache=True)
        changed = attached.changed
        language.model(TOKENS[:, 8:9], past_key_values=output.past_key_values, use_cache=True)
        assert changed == attached.changed == MASK[:, :8].sum()


def test_where_a_model_tells_single_tokens_are_texts_of_their_own(language: Case) -> None:
    """Two forwards of one token without a cache are two texts, not one text of two."""
    sae = make_sae("topk", language.activation(language.middle))
    with saekit.attach(
        language.model, sae, language.middle, edits={3: saekit.add(2.0)}, positions=[0], record=True
    ) as attached:
        language.logits(TOKENS[:, :1])
        language.logits(TOKENS[:, 1:2])
        assert attached.changed == 4 and len(attached.codes) == 1


def test_where_a_model_cannot_tell_positions_are_counted() -> None:
    from interventions.models import Plain

    model = Plain().requires_grad_(False)
    sae = make_sae("topk", model.embed(TOKENS))
    with saekit.attach(
        model, sae, "layers.0", edits={3: saekit.add(2.0)}, positions=[0, 5, 6], record=True
    ) as attached:
        counts = []
        for tokens in (TOKENS[:, :5], TOKENS[:, 5:6], TOKENS[:, 6:7], TOKENS[:, :4], TOKENS[:, 4:5]):
            before = attached.changed
            model(tokens)
            counts.append((attached.changed - before, len(attached.codes)))
        assert counts == [(2, 1), (2, 2), (2, 3), (2, 1), (0, 2)]
        attached.restart()
        model(TOKENS[:, :1])
        assert len(attached.codes) == 1
        attached.restart()
    with saekit.attach(model, sae, "layers.0", edits={3: saekit.add(2.0)}, positions=[-1]):
        model(TOKENS[:, :5])
        with pytest.raises(UsageError, match="-1 counts from the end"):
            model(TOKENS[:, 5:6])


def test_negative_positions_are_refused_while_a_text_grows(language: Case) -> None:
    sae = make_sae("topk", language.activation(language.middle))
    for positions in ([-1], slice(-3, None), slice(0, -1)):
        with (
            pytest.raises(UsageError, match=r"positions: -\d counts from the end .* still growing .*use_cache=False"),
            saekit.attach(language.model, sae, language.middle, edits={3: saekit.add(1)}, positions=positions),
        ):
            language.model.generate(TOKENS, max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (MASK[:, :5], r"the mask is \[2, 5\] and the forward sees 2 rows of 12"),
        (MASK[:1], r"the mask is \[1, 12\] and the forward sees 2 rows of 12"),
        (lambda p: p, r"the function returned torch.int64 \[2, 12\] .* Return booleans"),
        (lambda p: p[0] > 3, r"returned torch.bool \[12\] for positions \[2, 12\]"),
    ],
)
def test_positions_that_do_not_fit_the_forward(case: Case, positions, message: str) -> None:
    sae = make_sae("topk", case.activation(case.middle))
    with (
        pytest.raises(UsageError, match=message),
        saekit.attach(case.model, sae, case.middle, edits={3: saekit.add(1)}, positions=positions),
    ):
        case.logits()
