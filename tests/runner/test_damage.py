"""One changed byte in any file of a run, or of its cache, is found when the file is read, and named with what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import saekit
from saekit.activations.cache import CachedSource
from saekit.errors import UsageError
from saekit.graph import FeatureGraph
from saekit.run_directory import RunDirectory, read_run
from saekit.testing.tiny import TinyRun, language_source, tiny_run
from saekit.training import checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A run with a graph, an analysis and a cache beside it."""
    place = tmp_path_factory.mktemp("damage")
    return tiny_run(
        place / "run",
        source={**language_source(), "cache": str(place / "cache"), "cache_tokens": 1_500},
        architecture={"use": "topk", "d_sae": 16, "k": 2},
        graph={"use": "coactivation", "k": 3},
        analyzer=[{"use": "features"}],
    )


@pytest.fixture
def copied(finished: TinyRun, tmp_path: Path) -> Path:
    """A copy of the folder that holds `run` and `cache`."""
    return shutil.copytree(finished.directory.parent, tmp_path / "copy")


def harmed(path: Path, times: int = 12) -> Iterator[int]:
    """Change one byte of a file, again and again at other places, each time in what was whole; where."""
    whole = path.read_bytes()
    for place in sorted({int(share * (len(whole) - 1)) for share in torch.linspace(0, 1, times).tolist()}):
        content = bytearray(whole)
        content[place] ^= 1 if content[place] not in b" \t\n\r" else 0x41  # white space for white space changes nothing
        path.write_bytes(content)
        yield place
    path.write_bytes(whole)


def refused(path: Path, read: Callable[[], object], *words: str) -> None:
    """Each harm makes `read` fail with an error that names the file, or its folder, and has one of the words."""
    for place in harmed(path):
        with pytest.raises(UsageError) as caught:
            read()
        message = str(caught.value)
        assert str(path) in message or str(path.parent) in message, (place, message)
        assert any(word in message for word in words), (place, message)


@pytest.mark.parametrize("file", ["cfg.json", "sae_weights.safetensors"])
def test_of_the_sae(copied: Path, file: str) -> None:
    sae = copied / "run" / "sae"
    words = ("Copy", "cannot be read", "key", "architecture", "Import it", "metadata", "is")
    refused(sae / file, lambda: saekit.load_sae(sae), *words)
    saekit.load_sae(sae)


def test_a_number_in_the_weights_or_in_the_configuration_is_not_taken_for_another(copied: Path) -> None:
    sae = copied / "run" / "sae"
    (sae / "cfg.json").write_text((sae / "cfg.json").read_text().replace('"k": 2', '"k": 3'))
    with pytest.raises(UsageError, match=r"cfg\.json: has changed since it was written.*Copy the directory again"):
        saekit.load_sae(sae)


def test_weights_that_another_program_wrote_are_not_checked(copied: Path) -> None:
    sae = copied / "run" / "sae"
    save_file(load_file(sae / "sae_weights.safetensors"), sae / "sae_weights.safetensors", {"format": "pt"})
    (sae / "cfg.json").write_text((sae / "cfg.json").read_text().replace('"k": 2', '"k": 3'))
    assert saekit.load_sae(sae).k == 3


@pytest.mark.parametrize("number", [2, 0, "1", None])
def test_another_format_of_the_sae_is_refused_with_the_version(copied: Path, number: object) -> None:
    path = copied / "run" / "sae" / "cfg.json"
    cfg = json.loads(path.read_text())
    cfg["metadata"]["saekit"]["format"] = number
    path.write_text(json.dumps(cfg))
    with pytest.raises(UsageError, match=rf"metadata\.saekit\.format is {number!r}, and saekit \d.* reads 1\."):
        saekit.load_sae(path.parent)


@pytest.mark.parametrize("file", [checkpoint.TENSORS, checkpoint.STATE])
def test_of_a_checkpoint(copied: Path, file: str) -> None:
    newest, older = checkpoint.found(copied / "run" / "checkpoints")[:2]
    for place in harmed(newest / file):
        path, _, _, warnings = checkpoint.newest_whole(copied / "run" / "checkpoints")
        assert path == older, place
        (warning,) = warnings
        assert str(newest) in warning


def test_of_the_graph(copied: Path) -> None:
    path = copied / "run" / "graph.safetensors"
    refused(path, lambda: FeatureGraph.load(path), "Build the graph again", "Build it again")


SHARDS = ("train-00000.safetensors", "held_out-00000.safetensors")


@pytest.mark.parametrize("file", ["source.json", "tokens.json", "documents.json", "index.json", *SHARDS])
def test_of_the_cache(copied: Path, finished: TinyRun, file: str) -> None:
    cache = copied / "cache"
    options = {key: value for key, value in language_source().items() if key != "use"}
    component = finished.registry.find("source", "labelled")

    def read() -> None:
        source = CachedSource(component.build(component.validate(options, "source")), cache, tokens=1_500)
        source.open(device=CPU, dtype=torch.float32)
        assert not source.missing
        for split in ("train", "held_out"):
            blocks = source.blocks(split, size=4_000, seed=0)
            next(blocks)

    read()
    refused(cache / file, read, "Remove", "another", "written again", "Write or download it again", "Name another")
    read()


@pytest.mark.parametrize("file", ["run.toml", "provenance.json", "metrics.jsonl", "summary.json", "analysis/features/result.json"])
def test_of_the_rest_of_a_finished_run(copied: Path, file: str) -> None:
    run = copied / "run"
    assert not read_run(run).problems
    for place in harmed(run / file, 6):
        problems = read_run(run).problems
        found = [text for text in problems if text.startswith(f"{file} has changed since the run ended")]
        assert found and "Bring it back" in found[0], (place, problems)


def test_every_file_of_a_run_has_a_checksum(finished: TinyRun) -> None:
    run = finished.directory
    listed = {line.split("  ")[1] for line in RunDirectory(run).checksums.read_text().splitlines()}
    own = {"sae", "checkpoints"}  # read in the tests above
    there = {p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file() and p.relative_to(run).parts[0] not in own}
    assert there - listed == {"graph.safetensors", "report.html", "SHA256SUMS"}  # the report is made from the rest


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_any_byte_of_stored_activations_is_part_of_their_identity(tmp_path: Path, suffix: str) -> None:
    """A resume compares identities, so it never goes on with other data."""
    from saekit.builtin.sources import TensorsSource

    path = tmp_path / f"x{suffix}"
    x = torch.zeros(300_000, 8)
    np.save(path, x.numpy()) if suffix == ".npy" else save_file({"activations": x}, path)
    digests = set()
    size = path.stat().st_size
    for place in (size // 40, size // 3, size // 2 + 12_345, size - 1):  # with samples of 64 kB, most of these were not seen
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"\x01")
        digests |= set(TensorsSource(data=str(path)).identity()["data_digest"].values())
    assert len(digests) == 4
