"""What the shell completes for `saekit run`, asked as click's shells ask it, and that torch is not imported for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from helpers import Fakes, loss_plugin, python

from saekit.cli import COMMANDS, cli
from saekit.cli.completion import option_names
from saekit.component import Component
from saekit.plugins import Registry

COMPONENTS = [pytest.param(c, id=f"{c.kind}-{c.name}") for c in Registry().components() if c.kind != "recipe"]


def completed(*words: str) -> list[str]:
    """What is offered for the last of the words behind `saekit`."""
    *before, incomplete = words
    shell = ShellComplete(cli, {}, "saekit", "_SAEKIT_COMPLETE")
    return [item.value for item in shell.get_completions(list(before), incomplete)]


def test_commands_recipes_and_flags() -> None:
    assert completed("") == [*COMMANDS, "bench"]
    assert completed("run", "quick") == ["quickstart"]
    assert completed("run", "--arch") == ["--architecture"]
    shell = ShellComplete(cli, {}, "saekit", "_SAEKIT_COMPLETE")
    assert [item.type for item in shell.get_completions(["run"], "./my_r")] == ["file"]


def test_names_of_components() -> None:
    assert completed("run", "--loss", "ms") == ["mse"]
    assert completed("run", "--architecture", "t") == ["topk"]
    assert completed("run", "--analyze", "feat") == ["features"]
    assert {"jsonl", "tensorboard"} <= set(completed("run", "--loss", "mse", "--tracker", ""))
    assert completed("run", "--loss", "zz") == []


def test_options_behind_the_colon() -> None:
    assert completed("run", "--loss", "auxk:") == ["auxk:k=", "auxk:name=", "auxk:weight="]
    assert completed("run", "--loss", "builtin.auxk:w") == ["builtin.auxk:weight="]
    assert completed("run", "--loss", "auxk:k=3,") == ["auxk:k=3,name=", "auxk:k=3,weight="]
    assert completed("run", "--source", "text:ca") == ["text:cache=", "text:cache_tokens=", "text:cache_dtype="]
    assert "nothing_there:weight=" in completed("run", "--loss", "nothing_there:")


def test_keys_of_overrides_are_those_of_the_run_file_on_the_line(run_file: Callable[..., Path]) -> None:
    assert completed("run", "-o", "training.l") == ["training.lr=", "training.log_every="]
    assert "loss.auxk.weight=" in completed("run", "-o", "loss.")  # the default recipe has it
    file = run_file(loss=[{"use": "l1", "name": "thin"}], graph={"use": "absent"})
    assert completed("run", str(file), "-o", "loss.") == [
        "loss.thin.by_decoder_norm=", "loss.thin.name=", "loss.thin.weight="
    ]  # fmt: skip
    assert completed("run", str(file), "-o", "architecture.k") == ["architecture.k="]
    assert completed("run", str(file), "-o", "graph.t") == ["graph.tokens="]
    assert completed("run", "nowhere.toml", "-o", "evaluation.") == ["evaluation.tokens=", "evaluation.batch_size="]


def test_a_file_given_as_a_plugin_is_completed_too(plugin_file: Callable[[str, str], Path]) -> None:
    path = plugin_file(
        "mine",
        loss_plugin("hoyer", "return step.error.mean()").replace("step: Step", "step: Step, *, eps: float = 1.0"),
    )
    assert completed("run", "--plugin", str(path), "--loss", "ho") == ["hoyer"]
    assert "hoyer:eps=" in completed("run", "--plugin", str(path), "--loss", "hoyer:")
    assert completed("run", "--plugin", "nowhere.py", "--loss", "ms") == ["mse"]


@pytest.mark.parametrize("component", COMPONENTS)
def test_options_read_from_the_source_are_those_of_the_signature(component: Component) -> None:
    assert option_names(component) == list(component.options_model().model_fields)


def test_completing_imports_no_torch_and_no_target(fakes: Fakes) -> None:
    declares = """
        from saekit import Component, hookimpl
        @hookimpl
        def saekit_losses():
            yield Component("acme", "acme_targets:Acme", "Acme's.")
    """
    targets = "raise ImportError\nclass Base:\n    def __init__(self, *, eps: float): ...\nclass Acme(Base): ...\n"
    fakes.install("saekit-acme", "1.0", "acme", "acme_plugin", acme_plugin=declares, acme_targets=targets)
    done = python(
        """
        import json, sys
        from click.shell_completion import ShellComplete
        from saekit.cli import cli
        shell = ShellComplete(cli, {}, "saekit", "_SAEKIT_COMPLETE")
        asked = (["run"], ""), (["run", "--loss"], "acme:"), (["run", "-o"], ""), (["run", "--source"], "organism:"), ([], "")
        found = [[item.value for item in shell.get_completions(*words)] for words in asked]
        print(json.dumps([found, [name for name in ("torch", "transformers", "numpy") if name in sys.modules]]))
        """,
        environment=fakes.environment,
    )
    found, heavy = json.loads(done.stdout)
    assert found[1][0] == "acme:eps="
    assert all(found)
    assert heavy == []


def test_the_shell_is_asked_through_the_command_itself() -> None:
    """As zsh's script does it: the words stand in the environment, and the answer on stdout."""
    done = python(
        """
        import os, sys
        os.environ |= {"_SAEKIT_COMPLETE": "zsh_complete", "COMP_WORDS": "saekit run --loss ms", "COMP_CWORD": "3"}
        sys.argv = ["saekit"]
        from saekit.cli import main
        try:
            main()
        except SystemExit as end:
            assert not end.code
        """
    )
    assert done.stdout.splitlines()[:3] == ["plain", "mse", "Squared reconstruction error."]
