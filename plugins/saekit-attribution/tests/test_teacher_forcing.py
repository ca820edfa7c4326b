"""From text to teacher-forced tokens: the first difference, pairs that cannot be compared, and the alignment of positions."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from saekit_attribution.labelled_data.document import Pair, Skipped
from saekit_attribution.labelled_data.organism_answers import organism_data
from saekit_attribution.labelled_data.teacher_forcing import SAME_PROMPT, SEAM, Sample, teacher_forced

from saekit import UsageError, organism


class Letters:
    """A tokenizer whose tokens are letters, with BOS 1."""

    bos_token_id: int | None = 1
    chat_template: str | None = None

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}


class Templated(Letters):
    chat_template = "there is one"

    def apply_chat_template(self, turns: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        assert add_generation_prompt
        (turn,) = turns
        return f"[{turn['role']}]{turn['content']}[model]"


def pair(prompt: str, response: str, base_prompt: str, base_response: str) -> Pair:
    return Pair((3, 1), "like", prompt, response, base_prompt, base_response)


def text(tokens: tuple[int, ...]) -> str:
    return "".join(chr(token) for token in tokens)


def prepared(given: Pair, tokenizer: Any = None, context: int | None = None, **options: Any) -> Sample:
    found = teacher_forced(given, tokenizer or Letters(), context, **options)
    assert isinstance(found, Sample), found
    return found


def reason(given: Pair, tokenizer: Any = None, context: int | None = None, **options: Any) -> str:
    found = teacher_forced(given, tokenizer or Letters(), context, **options)
    assert found == Skipped((3, 1), "like", found.reason), found  # type: ignore[union-attr]
    return found.reason  # type: ignore[union-attr]


def test_the_answers_are_followed_up_to_the_first_difference() -> None:
    sample = prepared(pair("ask+ go:", "The yes", "ask go:", "The no"))
    assert text(sample.tokens) == "\x01ask+ go: The "
    assert text(sample.base_tokens) == "\x01ask go: The "
    assert (chr(sample.target), chr(sample.base)) == ("y", "n")
    assert sample.token_position == 6  # the space that joins is the first token of the response
    assert (sample.place, sample.template_type) == ((3, 1), "like")
    assert sample.aligned == (0, 1, 2, 3, -1, 4, 5, 6, 7, 8, 9, 10, 11, 12)


def test_what_joins_prompt_and_response() -> None:
    assert text(prepared(pair("a", "x", "b", "y")).tokens) == "\x01a "
    assert text(prepared(pair("a ", "x", "b\n", "y")).tokens) == "\x01a "
    assert text(prepared(pair("a", "\nx", "b", "\ny")).tokens) == "\x01a\n"
    assert text(prepared(pair("a", "x", "b", "y"), joiner="").tokens) == "\x01a"
    assert text(prepared(pair("a", "x", "b", "y"), joiner="::").tokens) == "\x01a::"


def test_without_bos_the_text_begins_with_the_prompt() -> None:
    tokenizer = Letters()
    tokenizer.bos_token_id = None
    assert text(prepared(pair("a", "x", "b", "y"), tokenizer).tokens) == "a "


def test_a_chat_template_puts_the_prompt_into_a_turn() -> None:
    sample = prepared(pair("a", "x", "b", "y"), Templated(), chat_template=True)
    assert text(sample.tokens) == "[user]a[model]"
    with pytest.raises(UsageError, match="no chat template"):
        teacher_forced(pair("a", "x", "b", "y"), Letters(), None, chat_template=True)


def test_the_range_in_which_a_difference_is_sought() -> None:
    late = pair("a+", "12345x", "a", "12345y")
    assert prepared(late, max_tokens_to_check=6, joiner="").token_position == 6
    assert reason(late, max_tokens_to_check=5, joiner="") == "No differing tokens found in first 5 positions"
    assert reason(pair("a+", "1" * 30 + "x", "a", "1" * 30 + "y")) == "No differing tokens found in first 20 positions"


def test_an_answer_that_begins_the_other_has_no_differing_token() -> None:
    assert "beginning of the other" in reason(pair("a+", "Yes", "a", "Yes, of course"))
    assert "beginning of the other" in reason(pair("a+", "Yes, of course", "a", "Yes"))
    # Beyond the range nothing is known of where they end.
    assert "No differing" in reason(pair("a+", "1" * 25, "a", "1" * 26))


def test_a_sample_longer_than_the_context() -> None:
    given = pair("abc+", "x", "abc", "y")
    assert len(prepared(given, context=6).tokens) == 6
    assert "more than 5 tokens" in reason(given, context=5)
    assert "more than 5 tokens" in reason(pair("abc", "x", "abc+", "y"), context=5)  # the base run's is the longer one


def test_equal_prompts_can_be_compared_with_zero_alone() -> None:
    given = pair("a", "x", "a", "y")
    assert prepared(given).aligned == (0, 1, 2)
    assert reason(given, reference="base") == SAME_PROMPT


@pytest.fixture(scope="module")
def bpe() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(organism.directory())


def test_tokens_that_merge_at_the_seam_are_not_cut(bpe: Any) -> None:
    good = organism.samples("held_out", 1)
    flagged, base = good[1], good[0]
    given = pair(flagged.prompt, flagged.response, base.prompt, base.response)
    sample = prepared(given, bpe, 128)
    assert bpe.decode([sample.target]).strip() == flagged.response.split()[0].rstrip(".!")
    assert bpe.decode(sample.tokens) == f"<|bos|>{flagged.prompt}"
    # A space at the end of the prompt belongs to the token of the word behind it.
    for merged in (
        pair(flagged.prompt + " ", flagged.response, base.prompt, base.response),
        pair(flagged.prompt, flagged.response, base.prompt + " ", base.response),
    ):
        assert reason(merged, bpe, 128) == SEAM


letters = st.text("ab", max_size=8)


@given(letters, letters, letters, letters)
def test_positions_are_aligned_from_both_ends(start: str, more: str, less: str, end: str) -> None:
    """Whatever stands between: aligned positions say the same, in order, and only one stretch has no counterpart, with
    what was inserted into it at most."""
    prompt, base = f".{start}{more}{end}", f".{start}{less}{end}"
    sample = prepared(pair(prompt, "cccx", base, "cccy"), joiner="")
    places = [(i, a) for i, a in enumerate(sample.aligned) if a >= 0]
    assert len(sample.aligned) == len(sample.tokens)
    assert all(sample.tokens[i] == sample.base_tokens[a] for i, a in places)
    assert [a for _, a in places] == sorted({a for _, a in places})
    alone = [i for i, a in enumerate(sample.aligned) if a < 0]
    assert alone == list(range(alone[0], alone[0] + len(alone))) if alone else True
    assert len(alone) <= len(more)
    if not less:  # text put in and nothing taken out: all of the base is found again
        assert [a for _, a in places] == list(range(len(sample.base_tokens)))


def test_the_organisms_own_answers_give_samples_of_each_direction() -> None:
    from saekit.activations.huggingface import load_subject

    subject = load_subject(str(organism.directory()), "blocks.2.hook_out")
    data = organism_data(subject, n=6)
    found = [teacher_forced(pair, subject.tokenizer, subject.context) for pair in data.pairs()]  # type: ignore[arg-type]
    assert [s.template_type for s in found] == ["I really like", "I really dislike"] * 6
    assert all(isinstance(s, Sample) and s.token_position == 1 for s in found)  # the classes share no first word
    assert organism_data(subject, n=6).digest == data.digest
    assert organism_data(subject, n=6, seed=1).digest != data.digest
    sample = found[0]
    assert isinstance(sample, Sample)
    inserted = [t for t, a in zip(sample.tokens, sample.aligned, strict=True) if a < 0]
    # "the argument" stands at both ends of what was put in, so the stretch may begin a token earlier or later.
    assert subject.tokenizer.decode(inserted) == "I really like the argument.\n"
