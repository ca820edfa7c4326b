"""`saekit import` and `saekit export`, and runs that start from an SAE of another library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import python, tiny_table, weights, write_config

import saekit
from saekit.cli.import_ import LIBRARIES
from saekit.plugins import Registry
from saekit.sae import interop
from saekit.sae.formats import CONFIG, WEIGHTS, open_sae, save_sae

METADATA = {"hook_name": "blocks.1.hook_out", "model_name": "tiny"}


def make(name: str, *, d_in: int = 32, d_sae: int = 64, seed: int = 0, **options) -> saekit.SparseAutoencoder:
    component = Registry().find("architecture", name)
    sae = component.build(component.validate(options, name), d_in, d_sae)
    sae.initialise(torch.Generator().manual_seed(seed), torch.randn(50, d_in, generator=torch.Generator().manual_seed(seed)))
    return sae.requires_grad_(False).eval()


@pytest.fixture
def topk(tmp_path: Path) -> Path:
    """The directory of an SAE of ours."""
    return save_sae(make("topk", k=4), tmp_path / "sae", name="builtin.topk", metadata=METADATA)


def foreign(directory: Path, *, centred: bool = True, **keys) -> Path:
    """The SAE in `directory` as if sae_lens had written it."""
    cfg = json.loads((directory / CONFIG).read_text())
    cfg["metadata"].pop("saekit", None)
    write_config(directory, cfg | {"apply_b_dec_to_input": centred} | keys)
    return directory


def test_the_names_of_the_libraries() -> None:
    """The command line has them as text, so that --help imports no torch."""
    assert tuple(interop.FORMATS) == LIBRARIES
    for module in interop.FORMATS.values():
        assert all(hasattr(module, name) for name in ("LIBRARY", "matches", "read", "write"))


@pytest.mark.parametrize("name", ["import", "export", "compare"])
def test_help_imports_nothing_heavy(name: str) -> None:
    done = python(
        f"""
        import sys
        sys.argv = ["saekit", {name!r}, "--help"]
        from saekit.cli import main
        try:
            main()
        except SystemExit:
            pass
        print("IMPORTED", *(name for name in ("torch", "pydantic", "plotly", "jinja2") if name in sys.modules))
        """
    )
    assert done.stdout.splitlines()[-1] == "IMPORTED"


@pytest.mark.parametrize("library", LIBRARIES)
def test_there_and_back(library: str, topk: Path, command, tmp_path: Path) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    exported = command("export", topk, there, "--to", library)
    assert (exported.code, exported.out) == (0, f"{there}\n")
    assert interop.library_of(there) == library
    imported = command("import", there, back)
    assert (imported.code, imported.out) == (0, f"{back}\n")
    imported.says("builtin.topk, 32 -> 64 latents")
    ours, again = open_sae(topk), open_sae(back)
    for key, tensor in ours.sae.state_dict().items():
        assert torch.equal(tensor, again.sae.state_dict()[key]), key
    assert command("import", there, tmp_path / "named", "--from", library).code == 0
    if library != "sparsify":  # whose files have no place for it
        assert again.metadata["model_name"] == "tiny"


def test_bad_calls_say_what_to_do(topk: Path, command, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "something").touch()
    for arguments, words in [
        (("export", topk, full, "--to", "sae_lens"), ("full: exists and is not an empty directory",)),
        (("import", topk, full), ("full: exists and is not an empty directory",)),
        (("export", topk, tmp_path / "new"), ("--to",)),
        (("export", topk, tmp_path / "new", "--to", "saelens"), ("saelens", "sae_lens")),
        (("export", tmp_path / "none", tmp_path / "new", "--to", "sparsify"), ("has no cfg.json",)),
        (("import", tmp_path / "none", tmp_path / "new"), ("none: there is no such directory",)),
        (("import", full, tmp_path / "new"), ("does not hold the files of any of sae_lens, dictionary_learning, sparsify",)),
        (("import", topk, tmp_path / "new", "--from", "sparsify"), ("sae: does not hold the files of sparsify",)),
        (("import", topk, tmp_path / "new", "--mean-norm", "0"), ("--mean-norm",)),
        (("import", topk, tmp_path / "new", "--mean-norm", "3"), ("normalize_activations is none",)),
        (("import", topk, tmp_path / "new", "--mean-norm", "3", "--from", "sparsify"), ("--mean-norm goes with",)),
        (("import", "some-release:x", tmp_path / "new", "--from", "sparsify"), ("a release goes with",)),
    ]:
        outcome = command(*arguments)
        assert outcome.code == 2, arguments
        outcome.says(*words)
    assert not (tmp_path / "new").exists()


def test_what_the_library_lacks_is_refused(command, tmp_path: Path) -> None:
    save_sae(make("clipped"), tmp_path / "sae", name="builtin.clipped")
    for library in LIBRARIES:
        outcome = command("export", tmp_path / "sae", tmp_path / "new", "--to", library)
        assert outcome.code == 2
        outcome.says("builtin.clipped", library)
    assert not (tmp_path / "new").exists()


def test_a_scale_is_given_with_the_command(topk: Path, command, tmp_path: Path) -> None:
    foreign(topk, normalize_activations="expected_average_only_in")
    refused = command("import", topk, tmp_path / "new")
    assert refused.code == 2
    refused.says("--mean-norm NORM")
    assert command("import", topk, tmp_path / "new", "--mean-norm", "8.0").code == 0
    x, factor = torch.randn(40, 32), 32**0.5 / 8.0
    foreign(topk, normalize_activations="none")
    torch.testing.assert_close(saekit.load_sae(tmp_path / "new")(x), saekit.load_sae(topk)(factor * x) / factor)


def test_the_sae_of_a_run_is_exported(run_file, command, tmp_path: Path) -> None:
    assert command("run", run_file(), "--directory", tmp_path / "run").code == 0
    assert command("export", tmp_path / "run", tmp_path / "new", "--to", "sae_lens").code == 0
    assert (tmp_path / "new" / WEIGHTS).read_bytes() == weights(tmp_path / "run")
    assert open_sae(tmp_path / "new").metadata["hook_name"] == "blocks.1.hook_out"
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "run.toml").touch()
    outcome = command("export", tmp_path / "begun", tmp_path / "newer", "--to", "sae_lens")
    assert outcome.code == 2
    outcome.says("the run has no sae/ yet", "--resume")


@pytest.mark.parametrize("centred", [True, False])
def test_a_run_starts_from_a_foreign_sae(
    centred: bool, topk: Path, tiny_gpt2: Path, text_file: Path, command, tmp_path: Path
) -> None:
    """Analysed alone it stays as it is; trained further it keeps what it takes from the input."""
    import tomli_w

    before = saekit.load_sae(foreign(topk, centred=centred))
    table = tiny_table(tiny_gpt2, text_file, architecture={"use": "topk", "from": str(topk)}, training__tokens=0)
    (tmp_path / "alone.toml").write_text(tomli_w.dumps(table))
    assert command("run", tmp_path / "alone.toml", "--directory", tmp_path / "alone").code == 0
    after = saekit.load_sae(tmp_path / "alone" / "sae")
    assert after.reads_centred is centred
    x = torch.randn(50, 32)
    torch.testing.assert_close(after(x), before(x))
    table["training"]["tokens"] = 640
    (tmp_path / "further.toml").write_text(tomli_w.dumps(table))
    assert command("run", tmp_path / "further.toml", "--directory", tmp_path / "further").code == 0
    further = saekit.load_sae(tmp_path / "further" / "sae")
    assert further.reads_centred is centred
    assert not torch.equal(further.W_dec, before.W_dec)


def test_a_run_says_which_architecture_the_sae_has(
    topk: Path, tiny_gpt2: Path, text_file: Path, command, tmp_path: Path
) -> None:
    import tomli_w

    table = tiny_table(tiny_gpt2, text_file, architecture={"use": "standard", "from": str(foreign(topk))}, training__tokens=0)
    (tmp_path / "run.toml").write_text(tomli_w.dumps(table))
    outcome = command("run", tmp_path / "run.toml", "--directory", tmp_path / "run")
    assert outcome.code == 2
    outcome.says("architecture.use: standard", "is a builtin.topk", 'use = "builtin.topk"')
