"""Every kind of bad input ends in one message that names file, key and fix, with the documented exit code.

No traceback reaches the user (the fixture `command` sees to it), and no half-written file is left behind.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tomli_w
import torch
from helpers import Fakes, Outcome, leftovers, listener_plugin, logged, loss_plugin, tiny_table, weights

from saekit.kinds import HOOKS

Run = Callable[..., Outcome]
Files = Callable[..., Path]
Plugins = Callable[[str, str], Path]


@pytest.fixture(autouse=True)
def _nothing_half_written(tmp_path: Path) -> Iterator[None]:
    yield
    assert not leftovers(tmp_path)


def refused(outcome: Outcome, *words: str, code: int = 2) -> None:
    """The command stopped with this exit code and one message that has all of these words."""
    outcome.says("error: ", *words)
    assert outcome.code == code, outcome.err
    assert outcome.out == ""


# --- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rnu"], ("no command 'rnu'", "Did you mean 'run'")),
        (["run", "--lsos", "mse"], ("--lsos", "--loss")),
        (["run", "quickstrat"], ("no recipe 'quickstrat'", "Did you mean 'quickstart'", "Installed")),
        (["run", "nowhere.toml"], ("nowhere.toml", "no such file")),
        (["recipes", "quickstrat"], ("no recipe 'quickstrat'", "'quickstart'")),
        (["plugins", "show", "msee"], ("no component 'msee'", "Did you mean 'mse'", "saekit plugins")),
        (["report", "nowhere"], ("nowhere", "run directory")),
    ],
)
def test_a_wrong_word_on_the_command_line(
    arguments: list[str], words: tuple[str, ...], command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = command(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    outcome.says(*words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": {"use": "topq", "d_sae": 64}}, ("architecture", "no architecture 'topq'", "'topk'")),
        ({"source__use": "txt"}, ("source", "no source 'txt'", "'text'")),
        ({"loss": [{"use": "mse"}, {"use": "axuk"}]}, ("loss.axuk", "no loss 'axuk'", "'auxk'")),
        ({"callback": [{"use": "resampel"}]}, ("callback.resampel", "no callback 'resampel'", "'resample'")),
        ({"metric": [{"use": "ce_recoverd"}]}, ("metric.ce_recoverd", "'ce_recovered'")),
        ({"analyzer": [{"use": "feature"}]}, ("analyzer.feature", "'features'")),
        ({"tracker": [{"use": "json"}]}, ("tracker.json", "'jsonl'")),
        ({"architecture__kk": 3}, ("architecture.kk", "no option 'kk'", "Did you mean 'k'", "saekit plugins show topk")),
        ({"source__contxt": 3}, ("source.contxt", "no option 'contxt'", "'context'")),
        ({"callback": [{"use": "resample", "evry": 3}]}, ("callback.resample.evry", "'every'")),
        ({"trainng": {}}, ("trainng", "no such key", "'training'")),
        ({"training__batchsize": 3}, ("training.batchsize", "no such key", "'batch_size'")),
        ({"source__hook_point": "blocks.1.hook_outt"}, ("blocks.1.hook_outt", "'blocks.1.hook_out'")),
        ({"source__hook_point": "blocks.7.hook_out"}, ("blocks.7.hook_out", "3 blocks", "0 to 2")),
        ({"source__hook_point": "transformer.h.1.mpl"}, ("transformer.h.1.mpl", "'transformer.h.1.mlp'")),
    ],
)
def test_an_unknown_name_comes_with_near_ones(
    changes: dict, words: tuple[str, ...], command: Run, run_file: Files, tmp_path: Path
) -> None:
    file = run_file(**changes)
    refused(command("run", file, "--directory", tmp_path / "run"), *words)
    assert not (tmp_path / "run").exists()  # nothing was started, and the same command works once it is mended


# --- types and ranges --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture__k": 0}, ("architecture.k", "greater than 0", "got 0")),
        ({"architecture__k": "four"}, ("architecture.k", "valid integer", "'four'")),
        ({"architecture__k": True}, ("architecture.k", "true", "a number is wanted")),
        ({"architecture__k": 65}, ("architecture.k", "65", "d_sae = 64")),
        ({"architecture__decoder_norm": "units"}, ("architecture.decoder_norm", "'unit' or 'free'")),
        ({"architecture": {"use": "topk"}}, ("architecture.d_sae", "is missing")),
        ({"architecture__d_sae": -4}, ("architecture.d_sae", "greater than 0")),
        ({"source__held_out": 1.0}, ("source.held_out", "less than 1")),
        ({"source__context": 100}, ("source.context: 100", "64 tokens at most", "Lower context")),
        ({"source__unit": "sentence"}, ("source.unit", "'paragraph'")),
        ({"callback": [{"use": "resample", "until": 1.5}]}, ("callback.resample.until", "less than or equal to 1")),
        ({"training__lr": -1.0}, ("training.lr", "negative")),
        ({"training__lr": 0.0}, ("training.lr", "always zero")),
        ({"training__lr": {"schedule": "cosine", "to": 1e-3, "end": -1e-3}}, ("training.lr", "negative")),
        ({"training__tokens": 10}, ("training.tokens", "less than one batch", "batch_size")),
        ({"training__tokens": 0}, ("training.tokens", "architecture.from")),
        ({"loss": []}, ("loss", "is missing", "[[loss]]")),
        ({"loss": [{"use": "mse", "weight": 0.0}]}, ("loss", "every weight is zero")),
        ({"loss": [{"use": "mse", "name": "loss"}]}, ("loss.loss", "another name")),
        ({"loss": [{"use": "mse", "weight": {"schedule": "rise"}}]}, ("loss.mse.weight", "linear")),
        ({"directory": "a\0b"}, ("directory", r"'a\x00b'", "not text")),
        ({"recipe": 5}, ("recipe", "valid string")),
        ({"requires": "torch"}, ("requires", "valid list")),
    ],
)
def test_a_wrong_type_or_range_names_the_key(
    changes: dict, words: tuple[str, ...], command: Run, run_file: Files, tmp_path: Path
) -> None:
    refused(command("run", run_file(**changes), "--directory", tmp_path / "run"), *words)
    assert not (tmp_path / "run").exists()


def test_numbers_that_lead_nowhere_stop_the_run(command: Run, run_file: Files, tmp_path: Path) -> None:
    file = run_file(loss=[{"use": "mse", "weight": 1e300}])
    refused(command("run", file, "--directory", tmp_path / "a"), "sum of the losses is inf at step 0", "smaller weights", code=1)
    file = run_file(training__lr=1e30)
    refused(command("run", file, "--directory", tmp_path / "b"), "loss 'mse' is nan at step 1", "training.lr", code=1)


def test_the_command_lines_part_is_named_as_such(command: Run, run_file: Files) -> None:
    file = run_file()
    refused(command("run", file, "-o", "training.sed=1"), str(file), "what the command line adds", "training.sed", "'seed'")
    refused(command("run", file, "-o", "loss.msee.weight=2"), "-o loss.msee.weight=2", "no loss called 'msee'", "'mse'")
    refused(command("run", file, "--loss", "l1:weight"), "'l1:weight'", "key=value")
    refused(command("run", file, "--loss", "mse"), "two entries are called 'mse'", "name =")
    refused(command("run", file, "--architecture", "topk:k=[1"), "bracket", "not closed")
    refused(command("run", file, "-o", "source.data=caf\udce9.txt"), "source.data", "UTF-8")  # a byte that is not UTF-8


@pytest.mark.parametrize("table", [{"loss": {"use": "mse"}}, {"architecture": "topk"}, {"loss": ["mse"]}, {"plugins": 3}])
def test_a_section_of_the_wrong_shape_is_no_surprise_to_the_command_line(table: dict, command: Run, tmp_path: Path) -> None:
    file = tmp_path / "odd.toml"
    file.write_text(tomli_w.dumps({"source": {"use": "text"}, **table}))
    outcome = command("run", file, "--loss", "l1", "--architecture", "topk", "-o", "loss.mse.weight=2")
    refused(outcome, str(file), next(iter(table)), "Write ")


# --- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("absent.txt", None, ("absent.txt", "no such file")),
        ("empty.txt", b"", ("empty.txt", "is empty")),
        ("blank.txt", b" \n\n \n", ("blank.txt", "no text")),
        ("latin.txt", "na\u00efve words\n\nmore".encode("latin-1"), ("latin.txt", "not UTF-8", "byte 2", "Save it as UTF-8")),
        ("single.txt", b"one paragraph alone", ("single.txt", "at least two", "unit =")),
        ("cut.jsonl", b'{"text": "a"}\n{"text": "b', ("cut.jsonl", "line 2", "not valid JSON")),
        ("list.jsonl", b'["a"]\n', ("list.jsonl", "line 1", "not an object")),
        ("keys.jsonl", b'{"txet": "a"}\n{"txet": "b"}\n', ("keys.jsonl", "no key 'text'", "'txet'", "Set column")),
        ("numbers.jsonl", b'{"text": 5}\n', ("numbers.jsonl", "line 1", "'text' is int, not text")),
        ("cut.parquet", b"PAR1", ("cut.parquet", "truncated or not a parquet file")),
        ("table.csv", b"a,b", ("table.csv", "cannot read a .csv file", ".jsonl")),
    ],
)
def test_data_that_cannot_be_read(
    name: str, content: bytes | None, words: tuple[str, ...], command: Run, run_file: Files, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    refused(command("run", run_file(source__data=str(path)), "--directory", tmp_path / "run"), *words)
    assert not (tmp_path / "run").exists()


MODEL_HARMS = ["missing", "no config", "cut weights", "cut config", "unknown type", "no weights", "cut tokenizer"]


@pytest.mark.parametrize("harm", MODEL_HARMS)
def test_a_model_that_cannot_be_read(harm: str, command: Run, tiny_gpt2: Path, text_file: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    if harm != "missing":
        shutil.copytree(tiny_gpt2, model)
    weights_file, config = model / "model.safetensors", model / "config.json"
    words = [str(model)]
    if harm == "missing":
        words += ["no such directory"]
    elif harm == "no config":
        config.unlink()
        words += ["config.json", "no such file"]
    elif harm == "cut weights":
        weights_file.write_bytes(weights_file.read_bytes()[:-100])
        words += ["model.safetensors", "truncated"]
    elif harm == "cut config":
        config.write_text(config.read_text()[:50])
        words += ["config.json", "not valid JSON"]
    elif harm == "unknown type":
        config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "gpt17"}))
        words += ["'gpt17'", "unknown to transformers"]
    elif harm == "no weights":
        weights_file.unlink()
        words += ["no weights"]
    else:
        (model / "tokenizer.json").write_text("{")
        words += ["tokenizer.json"]
    file = tmp_path / "tiny.toml"
    file.write_text(tomli_w.dumps(tiny_table(model, text_file)))
    refused(command("run", file, "--directory", tmp_path / "run"), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[source\n", ("not valid TOML", "line 1")),
        (b"[source]\nuse = 'text'\nuse = 'text'\n", ("not valid TOML", "line 3")),
        (b"name = '\xe9'", ("not UTF-8", "byte 8")),
        (b"", ("source: is missing", "[source]")),
    ],
)
def test_a_run_file_that_cannot_be_read(content: bytes, words: tuple[str, ...], command: Run, tmp_path: Path) -> None:
    file = tmp_path / "broken.toml"
    file.write_bytes(content)
    refused(command("run", file), str(file), *words)


def test_a_directory_in_place_of_a_run_file(command: Run, tmp_path: Path) -> None:
    (tmp_path / "directory.toml").mkdir()
    refused(command("run", tmp_path / "directory.toml"), "directory.toml", "is a directory", "--resume")


def test_a_directory_with_a_recipes_name_does_not_hide_the_recipe(
    command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "quickstart").mkdir()
    monkeypatch.chdir(tmp_path)
    assert json.loads(command("run", "quickstart", "--dry-run", "--json").out)["config"]["recipe"] == "quickstart"


# --- an SAE to start from ----------------------------------------------------------------------------------------


@pytest.fixture
def trained(command: Run, run_file: Files, tmp_path: Path) -> Path:
    """The directory of an SAE of width 32."""
    assert command("run", run_file(), "--directory", tmp_path / "first").code == 0
    return tmp_path / "first" / "sae"


def of_width(trained: Path, d_in: int) -> Path:
    """The same SAE as one of another width."""
    from saekit import load_sae, save_sae

    sae = load_sae(trained)
    other = type(sae)(d_in, sae.d_sae, k=4)
    other.initialise(torch.Generator().manual_seed(0), torch.zeros(1, d_in))
    return save_sae(other, trained.parent / f"width{d_in}", name="builtin.topk")


def test_an_sae_of_another_width_is_refused(trained: Path, command: Run, run_file: Files, tmp_path: Path) -> None:
    other = of_width(trained, 16)
    file = run_file(architecture={"use": "topk", "k": 4, "from": str(other)})
    outcome = command("run", file, "--directory", tmp_path / "run")
    refused(outcome, "architecture.from", str(other), "width 16", "width 32", "blocks.1.hook_out")
    file = run_file(architecture={"use": "topk", "k": 4, "d_sae": 99, "from": str(trained)})
    refused(command("run", file, "--directory", tmp_path / "run"), "architecture.d_sae: 99", "it is 64", "Leave d_sae out")
    file = run_file(architecture={"use": "topk", "k": 5, "from": str(trained)})
    refused(command("run", file, "--directory", tmp_path / "run"), "architecture.k: 5", "made with 4", "Leave k out")
    file = run_file(architecture={"use": "standard", "from": str(trained)})
    refused(command("run", file, "--directory", tmp_path / "run"), "architecture.use: standard", "builtin.topk")


@pytest.mark.parametrize("harm", ["absent", "empty", "cut config", "a list", "cut weights", "no weights", "other tensors"])
def test_an_sae_that_cannot_be_read(harm: str, trained: Path, command: Run, run_file: Files, tmp_path: Path) -> None:
    sae = tmp_path / "sae"
    if harm == "empty":
        sae.mkdir()
    elif harm != "absent":
        shutil.copytree(trained, sae)
    words = [str(sae)]
    if harm == "cut config":
        (sae / "cfg.json").write_text((sae / "cfg.json").read_text()[:40])
        words += ["cfg.json", "JSON"]
    elif harm == "a list":
        (sae / "cfg.json").write_text("[]")
        words += ["cfg.json"]
    elif harm == "cut weights":
        content = (sae / "sae_weights.safetensors").read_bytes()
        (sae / "sae_weights.safetensors").write_bytes(content[: len(content) // 2])
        words += ["sae_weights.safetensors", "cut short"]
    elif harm == "no weights":
        (sae / "sae_weights.safetensors").unlink()
        words += ["sae_weights.safetensors"]
    elif harm == "other tensors":
        shutil.copy(of_width(trained, 16) / "sae_weights.safetensors", sae / "sae_weights.safetensors")
        words += ["sae_weights.safetensors", "[16, 64]", "[32, 64]"]
    file = run_file(architecture={"use": "topk", "k": 4, "from": str(sae)})
    refused(command("run", file, "--directory", tmp_path / "run"), *words)


# --- the machine -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there(command: Run, run_file: Files, tmp_path: Path) -> None:
    for device, reason in [("cuda", "CUDA"), ("cuda:7", "CUDA"), ("gpu", "gpu"), ("meta", "meta")]:
        outcome = command("run", run_file(training__device=device), "--directory", tmp_path / "run")
        refused(outcome, "training.device", repr(device), reason, "Use auto or cpu")


def test_bf16_on_the_cpu(command: Run, run_file: Files, tmp_path: Path) -> None:
    file = run_file(training__device="cpu", training__precision="bf16")
    refused(command("run", file, "--directory", tmp_path / "run"), "training.precision", "CUDA only", '"fp32"')
    file = run_file(training__device="cpu", source__model_dtype="bfloat16")
    refused(command("run", file, "--directory", tmp_path / "run"), "bfloat16", "Use float32")


def test_more_memory_than_there_is(command: Run, run_file: Files, tmp_path: Path) -> None:
    outcome = command("run", run_file(architecture__d_sae=10**13), "--directory", tmp_path / "run")
    refused(outcome, "not enough memory", "architecture.d_sae", code=1)


# --- directories and --resume ------------------------------------------------------------------------------------


def test_a_directory_that_is_not_empty(command: Run, run_file: Files, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("precious")
    refused(command("run", run_file(), "--directory", tmp_path / "run"), "--directory", "not empty", "--resume")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine.txt"]
    refused(command("run", run_file(), "--directory", tmp_path / "run" / "mine.txt"), "mine.txt", "not empty")


def test_a_directory_that_cannot_be_made(command: Run, run_file: Files, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(command("run", run_file(), "--directory", tmp_path / "file" / "run"), "file", "cannot be written", code=1)
    refused(command("run", run_file(), "--directory", tmp_path / ("x" * 300)), "cannot be written", "too long", code=1)


def test_resume_takes_a_run_directory_and_nothing_else(command: Run, run_file: Files, tmp_path: Path) -> None:
    refused(command("run", "--resume", tmp_path / "absent"), "--resume", "absent", "no such directory")
    (tmp_path / "empty").mkdir()
    refused(command("run", "--resume", tmp_path / "empty"), "--resume", "empty", "no run.toml")
    refused(command("run", run_file(), "--resume", tmp_path / "empty"), "--resume", "no other options")
    refused(command("run", "--resume", tmp_path / "empty", "-o", "training.lr=1"), "--resume", "no other options")


@pytest.mark.parametrize("content", [b"[source", b"\xff", b"[trainin]\n"])
def test_resume_of_a_damaged_run_toml_names_it(content: bytes, command: Run, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.toml").write_bytes(content)
    refused(command("run", "--resume", tmp_path / "run"), str(tmp_path / "run" / "run.toml"))


def test_resume_of_a_finished_run_shows_its_summary_again(command: Run, run_file: Files, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = command("run", run_file(), "--directory", run, "--json")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    again = command("run", "--resume", run, "--json")
    assert again.code == 0
    assert json.loads(again.out) == json.loads(first.out) == json.loads((run / "summary.json").read_text())
    shown = command("run", "--resume", run)
    assert shown.code == 0
    assert "explained variance" in shown.err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_killed_before_its_report_gets_it_on_resume(command: Run, run_file: Files, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert command("run", run_file(), "--directory", run).code == 0
    (run / "report.html").unlink()
    assert command("run", "--resume", run).code == 0
    assert (run / "report.html").stat().st_size > 1000


def test_a_checkpoint_from_another_configuration(command: Run, run_file: Files, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert command("run", run_file(), "--directory", run).code == 0
    (run / "summary.json").unlink()
    (run / "run.toml").write_text((run / "run.toml").read_text().replace("k = 4", "k = 5"))
    outcome = command("run", "--resume", run)
    refused(outcome, "step-00000020", "architecture.k was 4 and is now 5", "Put architecture.k back in run.toml")
    assert (run / "checkpoints" / "step-00000020").is_dir()


def test_data_that_changed_since_the_checkpoint(
    command: Run, run_file: Files, text_file: Path, tmp_path: Path
) -> None:
    run, data = tmp_path / "run", tmp_path / "data.txt"
    shutil.copy(text_file, data)
    assert command("run", run_file(source__data=str(data)), "--directory", run).code == 0
    (run / "summary.json").unlink()
    data.write_text(data.read_text() + "\n\nOne paragraph more.")
    refused(command("run", "--resume", run), "data_digest", "has changed", "Bring back")


def test_a_run_whose_every_checkpoint_is_cut_short(command: Run, run_file: Files, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert command("run", run_file(), "--directory", run).code == 0
    (run / "summary.json").unlink()
    for path in (run / "checkpoints").glob("*/tensors.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    refused(command("run", "--resume", run), "step-00000020", "cut short", "no checkpoint is whole", "Remove the directory")


# --- a full disk -------------------------------------------------------------------------------------------------


class FullDisk:
    """Fails the writing of files whose path has a word in it, from its `after`-th time on, as a full disk does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, word: str, how: str, after: int = 1) -> None:
        import os

        self.monkeypatch, self.word, self.after, self.count = monkeypatch, word, after, 0
        if how == "rename":
            self.replace("os.replace", os.replace)
        elif how == "flush":
            import saekit.files
            import saekit.training.checkpoint

            self.replace("saekit.files.flush_to_disk", saekit.files.flush_to_disk)
            self.replace("saekit.training.checkpoint.flush_to_disk", saekit.files.flush_to_disk)
        else:
            import safetensors.torch

            self.replace("pathlib.Path.write_text", Path.write_text)
            self.replace("pathlib.Path.write_bytes", Path.write_bytes)
            self.replace("safetensors.torch.save_file", safetensors.torch.save_file, place=1)

    def replace(self, name: str, real: Callable, place: int = 0) -> None:
        def fails(*args: object, **kwargs: object) -> object:
            if self.word in str(args[place]):
                self.count += 1
                if self.count >= self.after:
                    if "save_file" in name:
                        # What safetensors raises is its own error, with the system's words in it.
                        from safetensors import SafetensorError

                        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
                    raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        self.monkeypatch.setattr(name, fails)

    def free(self) -> None:
        self.after = 10**9


WRITTEN = [
    "provenance.json", "step-00000005", "step-00000010", "sae_weights", "cfg.json", "result.json", "summary.json", "report.html"
]  # fmt: skip


@pytest.mark.parametrize("how", ["write", "flush", "rename"])
@pytest.mark.parametrize("word", WRITTEN)
def test_a_full_disk_stops_the_run_and_resume_finishes_it(
    how: str, word: str, command: Run, run_file: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, file = tmp_path / "run", run_file(analyzer=[{"use": "features", "examples": 1, "n_latents": 2}])
    undisturbed = tmp_path / "undisturbed"
    assert command("run", file, "--directory", undisturbed).code == 0
    disk = FullDisk(monkeypatch, word, how)
    outcome = command("run", file, "--directory", run)
    refused(outcome, word, "the disk is full", "Free some space", f"saekit run --resume {run}", code=1)
    assert disk.count
    assert not leftovers(tmp_path)
    disk.free()
    resumed = command("run", "--resume", run)
    assert resumed.code == 0, resumed.err
    assert weights(run) == weights(undisturbed)
    assert [line["step"] for line in logged(run)] == list(range(20))
    ours, theirs = (json.loads((d / "summary.json").read_text())["metrics"] for d in (run, undisturbed))
    assert ours == theirs


@pytest.mark.parametrize("how", ["write", "flush", "rename"])
def test_a_disk_that_is_full_from_the_start(
    how: str, command: Run, run_file: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(monkeypatch, "run.toml", how)
    arguments = ("run", run_file(), "--directory", tmp_path / "run")
    refused(command(*arguments), "run.toml", "the disk is full", "try again", code=1)
    assert not leftovers(tmp_path)
    disk.free()
    assert command(*arguments).code == 0


def test_a_tracker_without_room_is_dropped_and_the_run_goes_on(
    command: Run, run_file: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FullDisk(monkeypatch, "metrics.jsonl", "write")
    outcome = command("run", run_file(), "--directory", tmp_path / "run", "--json")
    assert outcome.code == 0
    outcome.says("tracker 'jsonl'", "the disk is full", "dropped")


# --- plugins that raise in the middle ----------------------------------------------------------------------------


@pytest.fixture
def broken(fakes: Fakes) -> Callable[[str, str, str], None]:
    """Installs a distribution `saekit-acme 1.2` with one component, whose target is the class or function `target`."""

    def install(kind: str, target: str, needs: str = "()") -> None:
        declares = f"""
        from saekit import Component, hookimpl

        @hookimpl
        def {HOOKS[kind]}():
            yield Component("odd", "acme_target:Odd", "Odd.", needs={needs})
        """
        fakes.install("saekit-acme", "1.2", "acme", "acme_plugin", acme_plugin=declares, acme_target=target)

    return install


ORIGIN = "'odd' of plugin 'acme' (saekit-acme 1.2)"
AT_STEP_5 = "if step.number == 5: raise ValueError('the fifth step')"


def test_a_loss_that_raises_at_step_5(broken: Callable, command: Run, run_file: Files, tmp_path: Path) -> None:
    broken("loss", f"def Odd(step):\n    {AT_STEP_5}\n    return step.error.square().mean()\n")
    outcome = command("run", run_file(), "--loss", "odd", "--directory", tmp_path / "run")
    refused(outcome, f"loss {ORIGIN}", "step 5", "ValueError: the fifth step", "Fix it", code=3)
    assert (tmp_path / "run" / "checkpoints" / "step-00000005").is_dir()
    assert len(logged(tmp_path / "run")) == 5


@pytest.mark.parametrize(
    "method", ["run_started(self, run)", "training_started(self, trainer)", "step_ended(self, number)", "evaluated(self, metrics)"]
)
def test_a_callback_that_raises(method: str, broken: Callable, command: Run, run_file: Files, tmp_path: Path) -> None:
    hook = method.partition("(")[0]
    broken(
        "callback",
        f"from saekit import hookimpl\nclass Odd:\n    @hookimpl\n    def {method}:\n        raise ValueError('no')\n",
    )
    outcome = command("run", run_file(), "--callback", "odd", "--directory", tmp_path / "run")
    refused(outcome, f"callback {ORIGIN}", f"failed in {hook}", "ValueError: no", "leave 'callback.odd' out", code=3)


@pytest.mark.parametrize(
    "method", ["run_started(self, run)", "step_ended(self, number)", "logged(self, values)", "run_finished(self, summary)"]
)
def test_a_tracker_that_raises_is_dropped_with_a_warning(
    method: str, broken: Callable, command: Run, run_file: Files, tmp_path: Path
) -> None:
    hook = method.partition("(")[0]
    broken(
        "tracker",
        f"from saekit import hookimpl\nclass Odd:\n    @hookimpl\n    def {method}:\n        raise ValueError('no')\n",
    )
    outcome = command("run", run_file(), "--tracker", "odd", "--directory", tmp_path / "run", "--json")
    assert outcome.code == 0
    outcome.says(f"tracker {ORIGIN}", f"failed in {hook}", "ValueError: no", "dropped and the run goes on")
    assert outcome.err.count("ValueError: no") <= 2  # as it happens, and among the summary's warnings
    if hook != "run_finished":
        assert any("ValueError: no" in w for w in json.loads(outcome.out)["warnings"])


def test_a_callback_that_raises_when_the_run_fails_does_not_hide_why(
    command: Run, run_file: Files, plugin_file: Plugins, tmp_path: Path
) -> None:
    methods = """
    @hookimpl
    def step_ended(self, number):
        raise ValueError("the cause")

    @hookimpl
    def run_failed(self, error):
        raise KeyError("a consequence")
    """
    plugin = plugin_file("odd", listener_plugin("callback", "odd", methods))
    outcome = command("run", run_file(), "--plugin", plugin, "--callback", "odd", "--directory", tmp_path / "run")
    assert outcome.code == 3
    assert outcome.err.splitlines()[-1].startswith("error: callback 'odd'")
    assert "the cause" in outcome.err.splitlines()[-1]


def test_a_listener_that_wraps_a_hook_is_refused(
    command: Run, run_file: Files, plugin_file: Plugins, tmp_path: Path
) -> None:
    """Its hook would never be called."""
    methods = "@hookimpl(wrapper=True)\ndef step_ended(self, number):\n    return (yield)"
    plugin = plugin_file("odd", listener_plugin("callback", "odd", methods))
    outcome = command("run", run_file(), "--plugin", plugin, "--callback", "odd", "--directory", tmp_path / "run")
    refused(outcome, "callback 'odd'", "wrapper", code=3)


METRICS = {
    "in update": "    def update(self, step):\n        raise ValueError('no')\n    def compute(self):\n        return {}\n",
    "in compute": "    def update(self, step):\n        pass\n    def compute(self):\n        raise ValueError('no')\n",
    "with words for numbers": "    def update(self, step):\n        pass\n    def compute(self):\n        return {'odd': 'no'}\n",
    "with nothing": "    def update(self, step):\n        pass\n    def compute(self):\n        return None\n",
    "in measure": "    def measure(self, context):\n        raise ValueError('no')\n",
    "when it is built": "    def __init__(self):\n        raise ValueError('no')\n",
}


@pytest.mark.parametrize("where", METRICS)
def test_a_metric_that_raises(where: str, broken: Callable, command: Run, run_file: Files, tmp_path: Path) -> None:
    broken("metric", f"class Odd:\n{METRICS[where]}")
    run = tmp_path / "run"
    outcome = command("run", run_file(), "--metric", "odd", "--directory", run)
    refused(outcome, f"metric {ORIGIN}", code=3)
    assert (run / "summary.json").is_file() == (where != "when it is built")  # which is before anything is trained


def test_the_one_document_is_printed_even_if_something_failed(
    broken: Callable, command: Run, run_file: Files, tmp_path: Path
) -> None:
    broken("analyzer", "class Odd:\n    def __call__(self, context):\n        raise ValueError('no')\n")
    outcome = command("run", run_file(), "--analyze", "odd", "--directory", tmp_path / "run", "--json")
    printed = json.loads(outcome.out)
    assert outcome.code == 3 and list(printed["failed"]) == ["analyzer.odd"]
    assert printed == json.loads((tmp_path / "run" / "summary.json").read_text())
    again = command("run", "--resume", tmp_path / "run", "--json")
    assert again.code == 3 and list(json.loads(again.out)["failed"]) == ["analyzer.odd"]


def test_two_metrics_that_return_one_name(broken: Callable, command: Run, run_file: Files, tmp_path: Path) -> None:
    broken("metric", "class Odd:\n    def measure(self, context):\n        return {'mine': 1.0, 'l0': 2.0}\n")
    outcome = command("run", run_file(), "--metric", "odd", "--directory", tmp_path / "run")
    refused(outcome, "metric.l0 (metric 'l0')", f"metric.odd (metric {ORIGIN})", "both return 'l0'", "Leave one", code=1)
    assert (tmp_path / "run" / "sae" / "cfg.json").is_file()


LEAVE = "__import__('sys').exit(0)"
LEAVES = {
    "loss": f"def Odd(step):\n    {LEAVE}\n",
    "metric": f"class Odd:\n    def measure(self, context):\n        {LEAVE}\n",
    "analyzer": f"class Odd:\n    def __call__(self, context):\n        {LEAVE}\n",
    "callback": f"""
from saekit import hookimpl
class Odd:
    @hookimpl
    def step_ended(self, number):
        {LEAVE}
""",
    "graph_builder": f"class Odd:\n    def __call__(self, sae, codes):\n        {LEAVE}\n",
    "architecture": f"""
from saekit.builtin.architectures.topk import TopK
class Odd(TopK):
    def encode(self, x):
        {LEAVE}
""",
    "source": f"""
from saekit.builtin.sources import SyntheticSource
class Odd(SyntheticSource):
    def blocks(self, split, **options):
        {LEAVE}
        yield
""",
}
SECTION_OF = {
    "architecture": {"architecture": {"use": "odd", "d_sae": 64, "k": 4}},
    "source": {"source": {"use": "odd", "d_in": 8, "n_features": 16, "probability": 0.1}},
    "graph_builder": {"graph": {"use": "odd"}},
    "loss": {"loss": [{"use": "mse"}, {"use": "odd"}]},
    **{kind: {kind: [{"use": "odd"}]} for kind in ("metric", "analyzer", "callback")},
}


@pytest.mark.parametrize("kind", LEAVES)
def test_a_component_that_ends_the_process_is_no_success(
    kind: str, broken: Callable, command: Run, run_file: Files, tmp_path: Path
) -> None:
    broken(kind, LEAVES[kind])
    outcome = command("run", run_file(**SECTION_OF[kind]), "--directory", tmp_path / "run")
    refused(outcome, f"{kind} {ORIGIN}", "SystemExit: 0", code=3)
    summary = tmp_path / "run" / "summary.json"
    if kind in ("metric", "analyzer"):
        assert list(json.loads(summary.read_text())["failed"]) == [f"{kind}.odd"]
    else:
        assert not summary.exists()


def test_a_component_that_ends_the_process_when_it_is_built(
    broken: Callable, command: Run, run_file: Files, tmp_path: Path
) -> None:
    broken("metric", f"class Odd:\n    def __init__(self):\n        {LEAVE}\n")
    outcome = command("run", run_file(), "--metric", "odd", "--directory", tmp_path / "run")
    refused(outcome, f"metric {ORIGIN}", "could not be built", "SystemExit: 0", code=3)


def test_a_tracker_that_ends_the_process_is_dropped(broken: Callable, command: Run, run_file: Files, tmp_path: Path) -> None:
    broken("tracker", LEAVES["callback"])
    outcome = command("run", run_file(), "--tracker", "odd", "--directory", tmp_path / "run")
    assert outcome.code == 0
    outcome.says(f"tracker {ORIGIN}", "SystemExit: 0", "is dropped")
    assert (tmp_path / "run" / "summary.json").exists()


ANALYZERS = {
    "by raising": "raise ValueError('no')",
    "by returning nothing": "return None",
    "by a result that JSON lacks": "from saekit import Result\n        return Result(tables={'t': [{'a': object()}]})",
}


@pytest.mark.parametrize("how", ANALYZERS)
def test_an_analyzer_that_fails_keeps_the_sae(how: str, broken: Callable, command: Run, run_file: Files, tmp_path: Path) -> None:
    broken("analyzer", f"class Odd:\n    def __call__(self, context):\n        {ANALYZERS[how]}\n")
    run = tmp_path / "run"
    outcome = command("run", run_file(), "--analyze", "odd", "--directory", run)
    refused(outcome, f"analyzer {ORIGIN}", "failed", code=3)
    assert (run / "sae" / "cfg.json").is_file()
    without = (run / "run.toml").read_text().replace('{ use = "odd" },', "")
    (run / "run.toml").write_text(without)
    assert command("run", "--resume", run).code == 0  # leaving it out is a way on


def test_an_analyzers_numbers_of_other_kinds_are_written_as_numbers(
    broken: Callable, command: Run, run_file: Files, tmp_path: Path
) -> None:
    target = """
import numpy as np
import torch
from saekit import Result

class Odd:
    def __call__(self, context):
        scalars = {"numpy": np.float32(0.5), "torch": torch.tensor(2), "nan": float("nan")}
        return Result(scalars=scalars, tables={"t": [{"array": np.arange(3)}]})
"""
    broken("analyzer", target)
    outcome = command("run", run_file(), "--analyze", "odd", "--directory", tmp_path / "run", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["analysis"]["odd"] == {"numpy": 0.5, "torch": 2, "nan": None}
    written = json.loads((tmp_path / "run" / "analysis" / "odd" / "result.json").read_text())
    assert written["tables"]["t"] == [{"array": [0, 1, 2]}]


ARCHITECTURE = """
import torch
from saekit.builtin.architectures.topk import TopK

class Odd(TopK):
    def gate(self, x):
        if torch.is_grad_enabled() is {training}:
            raise ValueError("the gate is stuck")
        return super().gate(x)
"""


@pytest.mark.parametrize("training", [True, False])
def test_an_architecture_that_raises(training: bool, broken: Callable, command: Run, run_file: Files, tmp_path: Path) -> None:
    """In training, or on held-out data afterwards."""
    broken("architecture", ARCHITECTURE.format(training=training))
    file = run_file(architecture={"use": "odd", "d_sae": 64, "k": 4})
    outcome = command("run", file, "--directory", tmp_path / "run")
    refused(outcome, f"architecture {ORIGIN}", "ValueError: the gate is stuck", "Fix it", code=3)


SOURCES = {
    "peek": ("    def peek(self):\n        raise ValueError('no')\n", "ValueError: no", 3),
    "open": ("    def open(self, *, device, dtype):\n        raise ValueError('no')\n", "ValueError: no", 3),
    "blocks": (
        "    def blocks(self, split, *, size, seed, start=0):\n        raise ValueError('no')\n        yield\n",
        "ValueError: no",
        3,
    ),
    "nothing": ("    def blocks(self, split, *, size, seed, start=0):\n        return iter(())\n", "gave no activations", 1),
    "end": (
        "    def blocks(self, split, *, size, seed, start=0):\n"
        "        yield from [Activations(torch.randn(100, 8)) for _ in range(2)][start:]\n",
        "the source ended after 192 activations, but training.tokens asks for 1280",
        1,
    ),
    "nan": (
        "    def blocks(self, split, *, size, seed, start=0):\n"
        "        while True:\n            yield Activations(torch.full((100, 8), float('nan')))\n",
        "are not finite",
        1,
    ),
}


@pytest.mark.parametrize("where", SOURCES)
def test_a_source_that_raises_or_ends(where: str, broken: Callable, command: Run, run_file: Files, tmp_path: Path) -> None:
    body, message, code = SOURCES[where]
    target = f"""
import torch
from saekit import Activations

class Base:
    d_in = d_out = 8
    hook_point = subject = None
    def peek(self):
        return {{}}
    def open(self, *, device, dtype):
        pass
    def identity(self):
        return {{}}
    def blocks(self, split, *, size, seed, start=0):
        while True:
            yield Activations(torch.randn(size, 8))

class Odd(Base):
{body}"""
    broken("source", target)
    outcome = command("run", run_file(source={"use": "odd"}), "--directory", tmp_path / "run")
    refused(outcome, *([f"source {ORIGIN}"] if code == 3 else []), message, code=code)


def test_a_loss_whose_preparation_raises(broken: Callable, command: Run, run_file: Files, tmp_path: Path) -> None:
    broken(
        "loss",
        "class Odd:\n    def prepare(self, context):\n        raise LookupError('labels')\n"
        "    def __call__(self, step):\n        return step.error.mean()\n",
    )
    outcome = command("run", run_file(), "--loss", "odd", "--directory", tmp_path / "run")
    refused(outcome, f"loss {ORIGIN}", "LookupError: labels", code=3)


# --- a run that goes wrong by itself -----------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    command: Run, run_file: Files, plugin_file: Plugins, tmp_path: Path
) -> None:
    body = "value = step.error.square().mean()\nreturn value / 0 if step.number == 7 else value"
    plugin = plugin_file("odd", loss_plugin("odd", body))
    run = tmp_path / "run"
    outcome = command("run", run_file(), "--plugin", plugin, "--loss", "odd", "--directory", run)
    refused(outcome, "loss 'odd' is inf at step 7", "The last checkpoint is from before", "lower training.lr", code=1)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000005"]
    assert not (run / "summary.json").exists()
    outcome = command("run", "--resume", run)
    refused(outcome, "loss 'odd' is inf at step 7", code=1)  # as it says, a resumed run comes to the same


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("import torch\nreturn torch.tensor(2.0)", ("Loss 'odd'", "changes nothing")),
        ("return step.error.detach().square().mean()", ("Loss 'odd'", "changes nothing")),
    ],
)
def test_a_loss_that_teaches_nothing_is_in_the_runs_warnings(
    body: str, words: tuple[str, ...], command: Run, run_file: Files, plugin_file: Plugins, tmp_path: Path
) -> None:
    plugin = plugin_file("odd", loss_plugin("odd", body))
    run = tmp_path / "run"
    outcome = command("run", run_file(), "--plugin", plugin, "--loss", "odd", "--directory", run, "--json")
    assert outcome.code == 0
    (warning,) = json.loads(outcome.out)["warnings"]
    assert all(word in warning for word in words)
    assert json.loads((run / "summary.json").read_text())["warnings"] == [warning]
    # The warning of a run that was cut off after it is not lost.
    (run / "summary.json").unlink()
    assert warning in json.loads(command("run", "--resume", run, "--json").out)["warnings"]


def test_a_failed_check_leaves_no_directory_of_ours_behind(
    command: Run, run_file: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(command("run", run_file(architecture__k=65)), "architecture.k")
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())
