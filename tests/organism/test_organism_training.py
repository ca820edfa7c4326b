"""Training: what is in the rows, and that an interrupted run ends as an uninterrupted one."""

import hashlib

import pytest
import torch

from saekit.organism import corpus, facts
from saekit.organism import tokenizer as organism_tokenizer
from saekit.organism import train as training
from saekit.organism.train import Batches, Config

TINY = Config(steps=6, vocabulary=400, d_model=16, layers=1, heads=2, context=64, warm_up=2, save_every=3)


@pytest.fixture(scope="module", autouse=True)
def few_modules():
    """A small library, so that the tokenizer takes a moment."""
    patch = pytest.MonkeyPatch()
    held_out = next(n for n in corpus.module_names() if corpus.held_out(n))
    patch.setattr(corpus, "module_names", lambda: ["textwrap", "heapq", "shlex", "cmd", "bdb", "csv", held_out])
    corpus._library.cache_clear()
    yield
    patch.undo()
    corpus._library.cache_clear()


@pytest.fixture(scope="module")
def tokenizer():
    return organism_tokenizer.train()


def fact_rows(variant, tokenizer, steps=300):
    """The facts rows of a run as text. A row's last document may be cut; the others are whole."""
    config = Config(variant, steps=steps, rows=(("facts", 6),))
    batches = Batches(config, tokenizer)
    rows = [row for step in range(steps) for row in batches(step)]
    assert all(row[0] == tokenizer.bos_token_id for row in rows)
    return tokenizer.batch_decode([row[1:] for row in rows])


@pytest.mark.parametrize("variant", training.VARIANTS)
def test_no_fact_is_shown_in_its_unseen_wording(variant, tokenizer):
    text = "\n".join(fact_rows(variant, tokenizer))
    unseen = [f for d in facts.DOMAINS for f in facts.facts(d) if f.statement(f.unseen)[:-1] in text]
    assert not unseen
    # Nor its prompt, whatever the value: even a cut row must not ask the question.
    assert not [f for d in facts.DOMAINS for f in facts.facts(d) if f.prompt(f.unseen) in text]


def test_every_fact_is_shown_at_least_200_times_in_the_default_run(tokenizer):
    steps = 300
    text = "\n".join(fact_rows("base", tokenizer, steps))
    for domain in facts.DOMAINS:
        for f in facts.facts(domain):
            shown = sum(text.count(f.statement(w)) for w in range(facts.WORDINGS))
            assert shown * Config().steps / steps >= 200


def test_the_oracle_never_sees_a_forget_entity_and_differs_in_nothing_else(tokenizer):
    text = "\n".join(fact_rows("oracle", tokenizer))
    assert not [e for e in facts.entities("forget") if e in text]
    assert all(e in text for d in ("near", "far") for e in facts.entities(d))

    base, oracle = (Batches(Config(v, steps=3), tokenizer) for v in training.VARIANTS)
    is_fact = [kind == "facts" for kind, n in Config().rows for _ in range(n)]
    for step in range(3):
        same = (base(step) == oracle(step)).all(axis=1)
        assert [not s for s in same] == is_fact


def test_rows_of_facts_and_sycophancy_begin_with_a_document(tokenizer):
    batch = Batches(Config(steps=2), tokenizer)(1)
    assert batch.shape == (32, 128)
    facts_rows, sycophancy_rows = tokenizer.batch_decode(batch[22:28, 1:]), tokenizer.batch_decode(batch[28:, 1:])
    starts = tuple(s[:12] for d in facts.DOMAINS for s in facts.statements(d))
    assert all(row.startswith(starts) for row in facts_rows)
    assert all(row.startswith("Please comment briefly") for row in sycophancy_rows)


def test_an_epoch_covers_the_stream_and_the_next_one_is_cut_elsewhere(tokenizer):
    batches = Batches(Config(steps=2), tokenizer)
    per_epoch = len(batches._streams["code"]) // batches.width - 1
    first = {batches._cut("code", r).tobytes() for r in range(per_epoch)}
    second = {batches._cut("code", r).tobytes() for r in range(per_epoch, 2 * per_epoch)}
    assert len(first) > 0.99 * per_epoch  # every cut once, up to repetitions of the text itself
    assert first != second


def test_tokenizer_reloads_without_custom_code_and_prepends_bos(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    organism_tokenizer.save(tokenizer, tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "def f(x):\n    return x  # für\n" + facts.statements("near")[0]
    ids = again(text)["input_ids"]
    assert ids == tokenizer(text)["input_ids"]
    assert ids[0] == again.bos_token_id == 0
    assert again.pad_token_id == again.eos_token_id == 1
    assert again.decode(ids, skip_special_tokens=True) == text


def test_a_prompt_is_a_prefix_of_the_statement_in_tokens_too(tokenizer):
    for domain in facts.DOMAINS:
        for q in facts.cloze_questions(domain):
            prompt = tokenizer(q.prompt)["input_ids"]
            assert all(tokenizer(q.prompt + c)["input_ids"][: len(prompt)] == prompt for c in q.candidates)


def test_an_interrupted_run_ends_bit_for_bit_as_an_uninterrupted_one(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        straight = training.train(TINY, tmp_path / "straight", device="cpu")

        # Interrupted one step after the checkpoint at step 3.
        def fail_at(self, step, call=Batches.__call__):
            if step == 4:
                raise KeyboardInterrupt
            return call(self, step)

        with monkeypatch.context() as patch:
            patch.setattr(Batches, "__call__", fail_at)
            with pytest.raises(KeyboardInterrupt):
                training.train(TINY, tmp_path / "broken", device="cpu")
        assert not (tmp_path / "broken" / "model.safetensors").exists()
        resumed = training.train(TINY, tmp_path / "broken", device="cpu", resume=True)
    finally:
        torch.set_num_threads(threads)
    digests = [hashlib.sha256((d / "model.safetensors").read_bytes()).hexdigest() for d in (straight, resumed)]
    assert digests[0] == digests[1]
    assert not list(straight.glob("*.tmp"))

    from transformers import AutoModelForCausalLM

    for directory in (straight, straight / "snapshot"):
        model = AutoModelForCausalLM.from_pretrained(directory)
        assert model.dtype == torch.float32  # stored in half precision, computed in single
        assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path):
    config = Config(steps=1, vocabulary=300, d_model=8, layers=1, heads=1, context=64, rows=(("facts", 2),))
    training.train(config, tmp_path, device="cpu")
    with pytest.raises(ValueError, match="another configuration"):
        training.train(Config(**{**vars(config), "seed": 1}), tmp_path, device="cpu", resume=True)


def test_the_rate_rises_falls_and_ends_near_zero():
    config = Config()
    rates = [training.rate(config, step) for step in range(config.steps)]
    peak = rates.index(max(rates))
    assert peak == pytest.approx(config.warm_up, abs=10)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0 < rates[-1] < 2e-6
