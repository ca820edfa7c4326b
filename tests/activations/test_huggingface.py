"""A model loads from a directory or the hub, or a single error says what is wrong with it."""

import json
import shutil
import time
from unittest.mock import Mock

import pytest
import torch

from saekit.activations.huggingface import load_subject, peek_model
from saekit.errors import UsageError


def broken(tiny_gpt2, tmp_path, change):
    directory = tmp_path / "model"
    shutil.copytree(tiny_gpt2, directory)
    change(directory)
    return directory


def rewrite(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def truncate(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "config.json").unlink(), r"config\.json: there is no such file"),
        (lambda d: truncate(d / "config.json"), r"config\.json: is not valid JSON"),
        (lambda d: (d / "config.json").write_text("{}"), r"config\.json: has no model_type"),
        (lambda d: (d / "config.json").write_text("[]"), r"config\.json: has no model_type"),
        (lambda d: rewrite(d, model_type="gtp2"), r"model_type 'gtp2' is unknown to transformers"),
        (lambda d: (d / "model.safetensors").unlink(), r"there are no weights"),
        (lambda d: truncate(d / "model.safetensors"), r"model\.safetensors: is truncated"),
        (lambda d: (d / "model.safetensors").write_bytes(b""), r"model\.safetensors: is truncated"),
        (lambda d: rewrite(d, n_layer=4), r"the weights lack \d+ tensors"),
        (lambda d: rewrite(d, n_embd=64), r"do not fit config\.json: .* is \[.*\] and should be \["),
        (lambda d: [p.unlink() for p in d.glob("tokenizer*")], r"tokenizer"),
        (lambda d: truncate(d / "tokenizer.json"), r"tokenizer\.json: is not valid JSON"),
    ],
)
def test_a_broken_directory_is_one_usage_error_that_names_it(tiny_gpt2, tmp_path, change, message):
    directory = broken(tiny_gpt2, tmp_path, change)
    with pytest.raises(UsageError, match=message) as caught:
        load_subject(str(directory), "blocks.1.hook_out")
    assert str(directory) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "there is no such directory"),
        ("/no/such/model", "there is no such directory"),
        ("no such name", "neither a directory nor a name"),
        ("nobody/nothing", "HF_HUB_OFFLINE is set"),
    ],
)
def test_a_model_that_is_nowhere_is_an_error_at_once(name, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    start = time.monotonic()
    with pytest.raises(UsageError, match=message):
        load_subject(name, "blocks.1.hook_out")
    assert time.monotonic() - start < 5


def test_a_hub_that_cannot_be_reached_or_lacks_the_model(monkeypatch):
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for error, message in [
        (ConnectionError("no route"), r"cannot be reached \(ConnectionError: no route\)\. Name a local directory"),
        (RepositoryNotFoundError("404", response=Mock()), "neither a directory nor a model of the Hugging Face hub"),
        (GatedRepoError("403", response=Mock()), "its owner asks for consent"),
    ]:
        monkeypatch.setattr(HfApi, "model_info", Mock(side_effect=error))
        with pytest.raises(UsageError, match=message):
            load_subject("nobody/nothing", "blocks.1.hook_out")


def test_bfloat16_is_refused_on_the_cpu(tiny_gpt2):
    with pytest.raises(UsageError, match="bfloat16 is for CUDA"):
        load_subject(str(tiny_gpt2), "blocks.1.hook_out", dtype=torch.bfloat16)


def test_a_file_is_not_a_model(text_file):
    with pytest.raises(UsageError, match="is a file. Name the directory"):
        peek_model(str(text_file))
