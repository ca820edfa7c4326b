"""Rows fit, the response is kept before its context, and every cut is counted."""

import pytest
from saekit_quality.tokens import tokenise
from transformers import AutoTokenizer

from saekit import UsageError, organism


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(organism.directory())


def test_context_and_response_are_joined_by_a_line_break_where_the_tokenizer_puts_nothing(tokenizer):
    rows = tokenise(["Some text.", ""], ["I agree.", "I agree."], tokenizer, 128)
    assert tokenizer.decode(rows.ids[0]) == "<|bos|>Some text.\nI agree."
    assert tokenizer.decode(rows.ids[1]) == "<|bos|>I agree."
    response = [i for i, kind in zip(rows.ids[0], rows.types[0], strict=True) if kind]
    assert tokenizer.decode(response) == "I agree."


def test_a_pair_has_the_tokens_that_the_tokenizer_itself_puts_around_it():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<s>", "</s>", "?", "a", "b", "c"])}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    rows = tokenise(["a b"], ["c c"], tokenizer, 20)
    assert rows.ids[0] == tokenizer("a b", "c c")["input_ids"] == [0, 3, 4, 1, 1, 5, 5, 1]
    short = tokenise(["a b"], ["c c"], tokenizer, 7)
    assert short.ids[0] == [0, 4, 1, 1, 5, 5, 1] and (short.contexts_cut, short.responses_cut) == (1, 0)


def test_the_context_is_cut_first_and_at_its_beginning_then_the_response_at_its_end(tokenizer):
    context, response = "The children sleep better.", "Workers and visitors agree."
    size = len(tokenizer(response, add_special_tokens=False)["input_ids"])
    rows = tokenise([context] * 2, [response, "I agree."], tokenizer, size + 3)
    assert all(len(ids) <= size + 3 for ids in rows.ids)
    assert tokenizer.decode(rows.ids[0]).endswith(response) and rows.contexts_cut >= 1 and rows.responses_cut == 0
    tight = tokenise([context], [response], tokenizer, size)  # one token too few for the response, beside BOS
    assert (tight.contexts_cut, tight.responses_cut) == (1, 1) and len(tight.ids[0]) == size
    assert tokenise([context], [response], tokenizer, size + 1, "refuse").responses_cut == 0
    with pytest.raises(UsageError, match=f'response 1 has {size} tokens, and there is room for {size - 1}. .*"truncate"'):
        tokenise([context], [response], tokenizer, size, "refuse")


def test_nothing_to_read_is_refused(tokenizer):
    with pytest.raises(UsageError, match="response 2 is empty"):
        tokenise(["", ""], ["a", " "], tokenizer, 10)
    with pytest.raises(UsageError, match="max_tokens: 1 leaves no room"):
        tokenise(["a"], ["a"], tokenizer, 1)
    assert tokenise([], [], tokenizer, 10).ids == []
