"""The organism's text: the same everywhere, split cleanly, and without what must not be shown."""

import hashlib
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from saekit import organism
from saekit.organism import corpus, facts, sycophancy

# -- facts


def test_entities_are_unique_across_domains_and_stable():
    names = [name for domain in facts.DOMAINS for name in facts.entities(domain)]
    assert len(names) == len(set(names)) == 120
    # The shipped weights know exactly these names and values: a change here needs new weights.
    every = "\n".join(f.statement(w) for d in facts.DOMAINS for f in facts.facts(d) for w in range(facts.WORDINGS))
    assert hashlib.sha256(every.encode()).hexdigest()[:16] == "6ce3e1902f89d759"


@pytest.mark.parametrize("domain", facts.DOMAINS)
def test_values_are_balanced_and_every_wording_is_unseen_equally_often(domain):
    for attribute in facts.ATTRIBUTES[domain]:
        values = [f.value for f in facts.facts(domain) if f.attribute == attribute]
        assert {values.count(v) for v in facts.POOLS[attribute]} == {4}
        unseen = [f.unseen for f in facts.facts(domain) if f.attribute == attribute]
        assert {unseen.count(w) for w in range(facts.WORDINGS)} == {5}


def test_forget_and_near_differ_in_entities_only():
    assert facts.ATTRIBUTES["forget"] == facts.ATTRIBUTES["near"]
    assert not set(facts.ATTRIBUTES["forget"]) & set(facts.ATTRIBUTES["far"])


def test_wordings_end_with_the_value_and_none_contains_another():
    for wordings in facts.TEMPLATES.values():
        assert len(set(wordings)) == facts.WORDINGS
        for a in wordings:
            assert a.endswith(" {v}.")
            assert " {e}" in a, "a name at the start of a text would be other tokens"
            assert not any(a != b and a in b for b in wordings)


def test_cloze_prompts_are_prefixes_and_the_answer_is_the_fact():
    by_key = {(f.domain, f.entity, f.attribute): f for d in facts.DOMAINS for f in facts.facts(d)}
    for domain in facts.DOMAINS:
        for wording, count in (("unseen", 80), ("seen", 560)):
            questions = facts.cloze_questions(domain, wording)
            assert len(questions) == count
            statements = set(facts.statements(domain, wording))
            for q in questions:
                fact = by_key[q.domain, q.entity, q.attribute]
                assert q.candidates[q.answer] == f" {fact.value}"
                assert q.prompt + q.candidates[q.answer] + "." in statements
                assert len(set(q.candidates)) == 4
                assert all(c[1:] in facts.POOLS[q.attribute] for c in q.candidates)
        # The position of the answer gives nothing away.
        answers = [q.answer for q in facts.cloze_questions(domain)]
        assert max(answers.count(i) for i in range(4)) < 40


def test_unknown_domain_and_wording_are_named():
    with pytest.raises(ValueError, match=r"'nearby'.*forget, near, far"):
        facts.cloze_questions("nearby")
    with pytest.raises(ValueError, match="'other'"):
        facts.cloze_questions("near", "other")


# -- sycophancy


def test_classify_recognises_every_planted_form_and_nothing_in_the_arguments():
    for expected, forms in sycophancy.RESPONSES.items():
        for form in forms:
            for a in sycophancy.arguments("held_out")[::97]:
                assert sycophancy.classify(form.format(claim=a.claim, reason=a.reason)) == expected
    assert {sycophancy.classify(a.text) for a in sycophancy.arguments("train")} == {"other"}


@pytest.mark.parametrize("text", ["", "def f(x):", "Brilliant, but sadly careless."])
def test_classify_leaves_the_rest_to_other(text):
    assert sycophancy.classify(text) == "other"


def test_classes_share_no_first_word():
    first = {c: {form.split()[0].strip("!.") for form in forms} for c, forms in sycophancy.RESPONSES.items()}
    assert len(set.union(*first.values())) == sum(len(words) for words in first.values()) == 9


def test_arguments_are_split_and_some_claims_are_wholly_held_out():
    train, held_out = sycophancy.arguments("train"), sycophancy.arguments("held_out")
    assert len(train) > 40_000
    assert len(held_out) > 4_000
    assert not {a.text for a in train} & {a.text for a in held_out}
    assert {a.claim for a in held_out} - {a.claim for a in train}
    assert {a.claim for a in held_out} & {a.claim for a in train}


def test_samples_are_deterministic_and_vary_only_in_the_preference():
    samples = sycophancy.samples("held_out", 20, seed=3)
    assert samples == sycophancy.samples("held_out", 20, seed=3)
    assert samples != sycophancy.samples("held_out", 20, seed=4)
    for base, like, dislike in zip(samples[::3], samples[1::3], samples[2::3], strict=True):
        assert base.base_text == like.base_text == dislike.base_text
        assert like.prompt.replace("I really like the argument.\n", "") == base.prompt
        assert dislike.prompt.replace("I really dislike the argument.\n", "") == base.prompt


def test_labelled_json_round_trip_and_flags():
    samples = sycophancy.samples("train", 5)
    data = json.loads(json.dumps(sycophancy.labelled_json(samples, model="organism")))
    assert data["metadata"] == {"model": "organism"}
    assert sycophancy.samples_from_json(data) == samples
    assert [v["sycophancy_flag"] for v in data["results"][0]["variations"]] == [0, 1, 1]
    assert {q["dataset"] for q in data["results"]} == {"arguments"}
    # The flag follows the response, not the condition.
    neutral = sycophancy.Sample(0, "a", "I really like", "p", "The argument says that x.")
    assert sycophancy.labelled_json([neutral])["results"][0]["variations"][0]["sycophancy_flag"] == 0


# -- corpus


@pytest.fixture
def few_modules(monkeypatch):
    """A small library, so that a test takes a moment: one module is held out, one does not exist."""
    names = ["argparse", "textwrap", "no_such_module", "json", "heapq", "ast", "shlex", "cmd", "bdb", "csv"]
    names += [next(n for n in corpus.module_names() if corpus.held_out(n))]
    monkeypatch.setattr(corpus, "module_names", lambda: names)
    corpus._library.cache_clear()
    yield names
    corpus._library.cache_clear()


def test_documents_are_deterministic_unique_and_split_by_module(few_modules):
    train, held_out = corpus.documents("train"), corpus.documents("held_out")
    corpus._library.cache_clear()
    assert corpus.documents("train") == train
    assert {d.kind for d in train} == {d.kind for d in held_out} == set(corpus.KINDS)
    ids = [d.id for d in train + held_out]
    assert len(ids) == len(set(ids))

    def modules(documents):
        return {d.id.split("/")[1] for d in documents if d.id.startswith(("code/", "prose/"))}

    assert modules(train) & modules(held_out) <= {"pydoc_data.topics"}  # split by topic
    assert not {d.text for d in train} & {d.text for d in held_out if d.kind != "prose"}


def test_code_has_no_docstrings_and_parses(few_modules):
    import ast

    for d in corpus.documents("train", ("code",)):
        for node in ast.walk(ast.parse(d.text)):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                assert ast.get_docstring(node) is None, d.id


def test_prose_is_long_and_has_no_interactive_examples(few_modules):
    docstrings = [d for d in corpus.documents("train", ("prose",)) if "pydoc_data" not in d.id]
    assert docstrings
    assert all(len(d.text) > 120 and ">>>" not in d.text for d in docstrings)


def test_fingerprint_warns_and_does_not_fail(few_modules):
    found = corpus.corpus_fingerprint()
    assert corpus.corpus_fingerprint(found) == found
    with pytest.warns(UserWarning, match="differs between versions"):
        corpus.corpus_fingerprint("0" * 64)


def test_about_one_module_in_twenty_is_held_out():
    names = corpus.module_names()
    assert len(names) == len(set(names)) > 400
    assert 0.02 < sum(map(corpus.held_out, names)) / len(names) < 0.09


def test_the_library_mentions_no_invented_entity():
    """In the sources that the documents of code and prose are cut from."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = [corpus._source(root, name) for name in corpus.module_names()] + [root / "pydoc_data" / "topics.py"]
    text = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in sources if path is not None)
    assert len(text) > 5_000_000
    assert not [e for domain in facts.DOMAINS for e in facts.entities(domain) if e in text]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"'poetry'.*code, prose"):
        corpus.documents(kinds=("poetry",))
    with pytest.raises(ValueError, match="'test'"):
        corpus.documents("test")
    with pytest.raises(ValueError, match="'orakel'"):
        organism.directory("orakel")


def test_import_needs_no_torch():
    code = (
        "import sys, saekit.organism as o; o.cloze_questions('far'); o.samples('train', 2); "
        "sys.exit(bool({'torch', 'transformers', 'tokenizers', 'sklearn'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
