"""The door: how plugins are found, listed, blocked, overridden and refused. Third parties are faked by their metadata."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import Fakes, Outcome, logged, loss_plugin, weights

import saekit
from saekit.component import Component
from saekit.errors import PluginError, UsageError
from saekit.plugins import DISABLE_VARIABLE, Plugin, Registry
from saekit.testing import registry_of

DECLARES = """
    from saekit import Component, hookimpl

    @hookimpl
    def saekit_losses():
        yield Component({name!r}, {target!r}, {summary!r})
"""
TARGETS = """
    def hoyer(step, *, eps: float = 1e-8):
        \"\"\"Squared Hoyer sparsity.\"\"\"
        code = step.code
        return (code.sum() ** 2 / (code.square_sum() + eps)).mean()

    def untyped(step, *, eps=1e-8):
        return step.error.mean()

    def swallows(step, **options):
        return step.error.mean()
"""
HOYER = '''\
from saekit import Component, Step, hookimpl

def hoyer(step: Step, *, eps: float = 1e-8):
    """Squared Hoyer sparsity of each row's code, averaged over the batch (the Hoyer-square of Yang, Wen and Li, 2020)."""
    code = step.code  # rows of active latents
    return (code.sum() ** 2 / (code.square_sum() + eps)).mean()  # [batch] -> scalar

@hookimpl
def saekit_losses():
    yield Component("hoyer", hoyer)
'''


def install(fakes: Fakes, name: str = "hoyer", plugin: str = "acme", version: str = "0.3.1", target: str = "") -> None:
    target = target or f"{plugin}_targets:hoyer"
    sources = {f"{plugin}_plugin": DECLARES.format(name=name, target=target, summary="Acme's loss."), f"{plugin}_targets": TARGETS}
    fakes.install(f"saekit-{plugin}", version, plugin, f"{plugin}_plugin", **sources)


def only(registry: Registry, name: str) -> Plugin:
    (plugin,) = [p for p in registry.plugins if p.name == name]
    return plugin


# --- found and listed --------------------------------------------------------------------------------------------


def test_an_installed_plugin_is_found_listed_and_shown_with_its_version(fakes: Fakes, command: Callable[..., Outcome]) -> None:
    install(fakes)
    listing = command("plugins")
    assert listing.code == 0
    assert re.search(r"hoyer\s+Acme's loss\.\s+\[saekit-acme 0\.3\.1\]", listing.out)
    shown = json.loads(command("plugins", "show", "acme.hoyer", "--json").out)
    assert [(o["name"], o["type"], o["default"]) for o in shown[0]["options"]] == [("eps", "float", 1e-8)]
    assert shown[0]["doc"] == "Squared Hoyer sparsity."
    document = json.loads(command("plugins", "--json").out)
    assert [p["version"] for p in document["plugins"] if p["name"] == "acme"] == ["0.3.1"]


def test_listing_imports_no_target(fakes: Fakes) -> None:
    install(fakes, target="acme_absent.module:Loss")
    registry = Registry()
    component = registry.find("loss", "hoyer")
    assert component.qualified_name == "acme.hoyer"
    with pytest.raises(PluginError, match=r"saekit-acme 0\.3\.1.*acme_absent.*Fix or upgrade saekit-acme"):
        component.load()


def test_a_plugin_joins_a_run_and_its_version_is_kept(
    fakes: Fakes, command: Callable[..., Outcome], run_file: Callable[..., Path], tmp_path: Path
) -> None:
    install(fakes)
    done = command("run", run_file(), "--loss", "hoyer:weight=0.1,eps=1e-6", "--directory", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    used = {p["name"]: p for p in json.loads(done.out)["plugins"]}
    assert used["acme"] == {"name": "acme", "distribution": "saekit-acme", "version": "0.3.1"}
    kept = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert used["acme"] in kept["plugins"]
    assert "loss/hoyer" in logged(tmp_path / "run")[0]


def test_what_a_plugin_prints_while_it_loads_stays_out_of_the_document(
    fakes: Fakes, command: Callable[..., Outcome], run_file: Callable[..., Path], tmp_path: Path
) -> None:
    """At its import, at its registration, at its target's import, and in the middle of a run."""
    declares = 'print("noise one")\n' + DECLARES.format(name="loud", target="loud_targets:loud", summary="Loud.").replace(
        "        yield", '        print("noise two")\n        yield'
    ).replace("\n    ", "\n")
    targets = 'print("noise three")\ndef loud(step):\n    print("noise four")\n    return step.error.square().mean()\n'
    fakes.install("saekit-loud", "1.0", "loud", "loud_plugin", loud_plugin=declares, loud_targets=targets)
    done = command("run", run_file(), "--loss", "loud", "--directory", tmp_path / "run", "--json")
    assert json.loads(done.out)["steps"] == 20
    for noise in ("one", "two", "three", "four"):
        assert f"noise {noise}" in done.err
    fakes.forget()
    assert json.loads(command("plugins", "--json").out)["plugins"]
    fakes.forget()
    assert json.loads(command("plugins", "show", "loud", "--json").out)[0]["qualified_name"] == "loud.loud"


# --- two that claim one name -------------------------------------------------------------------------------------


def test_a_third_party_overrides_a_built_in_with_a_warning(
    fakes: Fakes, command: Callable[..., Outcome], run_file: Callable[..., Path]
) -> None:
    install(fakes, name="mse")
    registry = Registry()
    assert registry.find("loss", "mse").qualified_name == "acme.mse"
    assert registry.find("loss", "builtin.mse").distribution == "saekit"
    plan = json.loads(command("run", run_file(), "--dry-run", "--json").out)
    assert {p["key"]: p["component"] for p in plan["parts"]}["loss.mse"] == "acme.mse"
    (warning,) = [w for w in plan["warnings"] if "mse" in w]
    assert "acme.mse" in warning and "saekit-acme" in warning and "overrides builtin.mse" in warning


def test_overriding_a_default_component_gives_one_entry_not_two(
    fakes: Fakes, command: Callable[..., Outcome], run_file: Callable[..., Path]
) -> None:
    source = """
    from saekit import Component, hookimpl

    @hookimpl
    def saekit_metrics():
        yield Component("l0", "saekit.builtin.metrics:L0", "Acme's.", default=True)
    """
    fakes.install("saekit-acme", "1.0", "acme", "acme_plugin", acme_plugin=source)
    plan = json.loads(command("run", run_file(), "--dry-run", "--json").out)
    assert [p["component"] for p in plan["parts"] if p["key"] == "metric.l0"] == ["acme.l0"]


def test_two_third_parties_with_one_name_are_both_named_and_the_full_name_works(fakes: Fakes) -> None:
    install(fakes, plugin="acme", version="0.3.1")
    install(fakes, plugin="bolt", version="2.0")
    registry = Registry()
    with pytest.raises(UsageError) as caught:
        registry.find("loss", "hoyer", where="loss.hoyer")
    for word in ("loss.hoyer", "acme.hoyer (saekit-acme 0.3.1)", "bolt.hoyer (saekit-bolt 2.0)", "in full"):
        assert word in str(caught.value)
    assert registry.find("loss", "bolt.hoyer").distribution == "saekit-bolt"
    assert registry.find("loss", "acme.hoyer").distribution == "saekit-acme"
    assert Registry(disabled=["bolt"]).find("loss", "hoyer").distribution == "saekit-acme"


def test_two_distributions_with_one_plugin_name_can_only_be_told_apart_by_uninstalling(fakes: Fakes) -> None:
    install(fakes, plugin="acme")
    fakes.install("saekit-acme-fork", "9.9", "acme", "acme_plugin")
    with pytest.raises(UsageError, match=r"saekit-acme 0\.3\.1.*saekit-acme-fork 9\.9.*uninstall one"):
        Registry().find("loss", "acme.hoyer")


# --- broken plugins ----------------------------------------------------------------------------------------------

BROKEN = {
    "raises on import": ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
    "leaves on import": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "lacks a module": ("import a_module_that_is_not_there", "No module named 'a_module_that_is_not_there'"),
    "raises on registration": (
        "from saekit import hookimpl\n@hookimpl\ndef saekit_losses():\n    raise KeyError('table')",
        "KeyError: 'table'",
    ),
    "misspells a hook": (
        "from saekit import hookimpl\n@hookimpl\ndef saekit_loses():\n    return []",
        "'saekit_loses' is not a hook of saekit. Did you mean 'saekit_losses'",
    ),
    "forgets the decorator": ("def saekit_losses():\n    return []", "lacks the decorator @saekit.hookimpl"),
    "takes unknown arguments": (
        "from saekit import hookimpl\n@hookimpl\ndef saekit_losses(config):\n    return []",
        "config",
    ),
    "puts a lifecycle hook into the module": (
        "from saekit import hookimpl\n@hookimpl\ndef step_ended(trainer):\n    pass",
        "'step_ended' is not a hook of a plugin's module",
    ),
    "yields something else": (
        "from saekit import hookimpl\n@hookimpl\ndef saekit_losses():\n    yield 'mse'",
        "saekit_losses must yield saekit.Component, not str",
    ),
    "returns nothing": (
        "from saekit import hookimpl\n@hookimpl\ndef saekit_losses():\n    pass",
        "saekit_losses must return or yield components, not NoneType",
    ),
    "hands over a callable": (
        "from saekit import Component, hookimpl\n@hookimpl\ndef saekit_losses():\n    yield Component('x', len)",
        "the target of 'x' must be a string",
    ),
    "has a bad name": (
        "from saekit import Component, hookimpl\n@hookimpl\ndef saekit_losses():\n    yield Component('My Loss', 'a:b')",
        "'My Loss' is not a name",
    ),
    "needs a list": (
        "from saekit import Component, hookimpl\n@hookimpl\ndef saekit_losses():\n    yield Component('x', 'a:b', needs=['y'])",
        "needs of 'x' must be a tuple",
    ),
    "needs a string": (
        "from saekit import Component, hookimpl\n@hookimpl\ndef saekit_losses():\n    yield Component('x', 'a:b', needs='labels')",
        "needs of 'x' must be a tuple",
    ),
    "says a name twice": (
        "from saekit import Component, hookimpl\n@hookimpl\n"
        "def saekit_losses():\n    yield Component('x', 'a:b')\n    yield Component('x', 'a:c')",
        "two components of the kind loss that are called 'x'",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_plugin_is_shown_and_stops_only_the_run_that_names_it(
    what: str, fakes: Fakes, command: Callable[..., Outcome], run_file: Callable[..., Path]
) -> None:
    source, error = BROKEN[what]
    fakes.install("saekit-broken", "0.9", "broken", "broken_plugin", broken_plugin=source)
    assert error in (only(Registry(), "broken").error or "")
    listing = command("plugins")
    assert listing.code == 0
    assert "failed to load: broken (saekit-broken 0.9)" in listing.out
    assert error in listing.out
    assert command("run", run_file(), "--dry-run").code == 0
    named = command("run", run_file(loss=[{"use": "broken.thing"}]), "--dry-run")
    assert named.code == 3
    named.says("loss.thing", "broken", "saekit-broken 0.9", error, "upgrade saekit-broken", "--no-plugin broken")
    short = command("run", run_file(loss=[{"use": "thing_it_would_have"}]), "--dry-run")
    assert short.code == 3
    short.says("saekit-broken 0.9", error)
    blocked = command("run", run_file(loss=[{"use": "broken.thing"}]), "--dry-run", "--no-plugin", "broken")
    assert blocked.code == 2
    blocked.says("'broken', which is disabled")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("acme_targets:untyped", ("option 'eps' has no type", "eps: float")),
        ("acme_targets:swallows", ("**kwargs", "Name each option")),
        ("acme_targets:absent", ("cannot be loaded", "absent", "Fix or upgrade saekit-acme")),
        ("acme_targets", ("cannot be loaded", "acme_targets")),
    ],
)
def test_a_target_that_breaks_the_contract_is_a_plugins_failure(
    target: str, words: tuple[str, ...], fakes: Fakes, command: Callable[..., Outcome], run_file: Callable[..., Path]
) -> None:
    install(fakes, target=target)
    done = command("run", run_file(loss=[{"use": "hoyer"}]), "--dry-run")
    assert done.code == 3
    done.says("loss 'hoyer' of plugin 'acme' (saekit-acme 0.3.1)", *words)


# --- disabled and unknown ----------------------------------------------------------------------------------------


def test_a_plugin_is_disabled_by_flag_and_by_environment(
    fakes: Fakes, command: Callable[..., Outcome], run_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(fakes)
    file = run_file(loss=[{"use": "mse"}, {"use": "hoyer"}])
    assert command("run", file, "--dry-run").code == 0
    flag = command("run", file, "--dry-run", "--no-plugin", "acme")
    assert flag.code == 2
    flag.says("loss.hoyer", "no loss 'hoyer'", "Disabled plugins", "acme")
    monkeypatch.setenv(DISABLE_VARIABLE, "revival, acme")
    environment = command("run", file, "--dry-run")
    assert environment.code == 2
    environment.says("Disabled plugins", "acme")
    assert "disabled: acme (saekit-acme 0.3.1)" in command("plugins").out


def test_a_disabled_plugin_is_not_even_imported(fakes: Fakes) -> None:
    fakes.install("saekit-broken", "0.9", "broken", "broken_plugin", broken_plugin="raise RuntimeError")
    assert only(Registry(disabled=["broken"]), "broken").error is None


def test_disabling_what_is_not_there_is_said(command: Callable[..., Outcome], run_file: Callable[..., Path]) -> None:
    done = command("run", run_file(), "--dry-run", "--json", "--no-plugin", "biultin")
    assert done.code == 0
    assert any("'biultin'" in w and "'builtin'" in w for w in json.loads(done.out)["warnings"])


def test_an_unknown_name_lists_near_ones_what_is_installed_and_how_to_get_more(
    command: Callable[..., Outcome], run_file: Callable[..., Path]
) -> None:
    done = command("run", run_file(loss=[{"use": "msee"}]), "--dry-run")
    assert done.code == 2
    done.says("loss.msee", "no loss 'msee'", "Did you mean 'mse'", "Installed: auxk, ", " l1, ", "pip")


def test_an_unknown_name_of_a_file_with_requirements_names_those_to_install(
    command: Callable[..., Outcome], run_file: Callable[..., Path]
) -> None:
    file = run_file(loss=[{"use": "infonce_of_acme"}], requires=["saekit-acme>=0.2", "saekit"])
    done = command("run", file, "--dry-run")
    assert done.code == 2
    done.says("pip install saekit-acme>=0.2")
    assert "pip install saekit-acme>=0.2 saekit" not in done.err


def test_an_unmet_need_says_who_provides_it(fakes: Fakes, command: Callable[..., Outcome], run_file: Callable[..., Path]) -> None:
    source = """
    from saekit import Component, hookimpl

    @hookimpl
    def saekit_losses():
        yield Component("needy", "acme_targets:hoyer", needs=("moonlight",))

    @hookimpl
    def saekit_callbacks():
        yield Component("moon", "acme_targets:hoyer", provides=("moonlight",))
    """
    fakes.install("saekit-acme", "1.0", "acme", "acme_plugin", acme_plugin=source, acme_targets=TARGETS)
    done = command("run", run_file(loss=[{"use": "needy"}]), "--dry-run")
    assert done.code == 2
    done.says("loss.needy", "needs 'moonlight'", "callback 'moon' (saekit-acme)")
    assert command("run", run_file(loss=[{"use": "needy"}]), "--dry-run", "--callback", "moon").code == 0


# --- a file as a plugin ------------------------------------------------------------------------------------------


def test_a_loss_of_twelve_lines_runs_from_a_file_and_again_on_resume(
    command: Callable[..., Outcome],
    run_file: Callable[..., Path],
    plugin_file: Callable[[str, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert len([line for line in HOYER.splitlines() if line.strip()]) <= 12
    path = plugin_file("my_loss", HOYER)
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    begun = ("run", run_file(), "--plugin", "./my_loss.py", "--loss", "hoyer:weight=0.01")
    done = command(*begun, "--directory", run, "--json")
    assert done.code == 0, done.err
    assert all("loss/hoyer" in line and 0 < line["loss/hoyer"] <= 4 for line in logged(run))  # at most k
    assert str(path) in (run / "run.toml").read_text()
    used = {p["name"]: p for p in json.loads(done.out)["plugins"]}["my_loss"]
    assert used["distribution"] == str(path)
    assert re.fullmatch(r"[0-9a-f]{8}", used["version"])

    # As if it had been killed after ten steps: the newest checkpoints and everything after training is gone.
    half = command(*begun, "--directory", tmp_path / "half", "-o", "training.keep_checkpoints=9")
    assert half.code == 0
    for name in ("step-00000015", "step-00000020"):
        for file in (tmp_path / "half" / "checkpoints" / name).iterdir():
            file.unlink()
        (tmp_path / "half" / "checkpoints" / name).rmdir()
    (tmp_path / "half" / "summary.json").unlink()
    resumed = command("run", "--resume", tmp_path / "half")
    assert resumed.code == 0, resumed.err
    assert weights(tmp_path / "half") == weights(run)
    assert [line["step"] for line in logged(tmp_path / "half")] == list(range(20))

    # run.toml is runnable as it is, from anywhere.
    monkeypatch.chdir("/")
    again = command("run", run / "run.toml", "--directory", tmp_path / "again")
    assert again.code == 0, again.err
    assert weights(tmp_path / "again") == weights(run)


def test_a_changed_file_is_named_on_resume(
    command: Callable[..., Outcome], run_file: Callable[..., Path], plugin_file: Callable[[str, str], Path], tmp_path: Path
) -> None:
    path = plugin_file("my_loss", HOYER)
    run = tmp_path / "run"
    assert command("run", run_file(), "--plugin", path, "--loss", "hoyer", "--directory", run).code == 0
    (run / "summary.json").unlink()
    path.write_text(HOYER + "# a remark\n")
    done = command("run", "--resume", run, "--json")
    assert done.code == 0
    assert any("'my_loss' has changed" in w for w in json.loads(done.out)["warnings"])


def test_a_file_overrides_what_is_installed(
    command: Callable[..., Outcome], run_file: Callable[..., Path], plugin_file: Callable[[str, str], Path]
) -> None:
    path = plugin_file("mine", loss_plugin("mse", "return step.error.abs().mean()"))
    plan = json.loads(command("run", run_file(), "--plugin", path, "--dry-run", "--json").out)
    assert {p["key"]: p["component"] for p in plan["parts"]}["loss.mse"] == "mine.mse"


def test_plugins_of_a_run_file_are_found_beside_it(
    command: Callable[..., Outcome], run_file: Callable[..., Path], plugin_file: Callable[[str, str], Path]
) -> None:
    plugin_file("beside", HOYER)
    file = run_file(plugins=["beside.py"], loss=[{"use": "mse"}, {"use": "beside.hoyer"}])
    assert command("run", file, "--dry-run").code == 0


@pytest.mark.parametrize("what", ["raises on import", "misspells a hook", "yields something else"])
def test_a_broken_file_stops_the_run_that_was_given_it(
    what: str, command: Callable[..., Outcome], run_file: Callable[..., Path], plugin_file: Callable[[str, str], Path]
) -> None:
    source, error = BROKEN[what]
    path = plugin_file("broken", source)
    done = command("run", run_file(), "--plugin", path, "--dry-run")
    assert done.code == 3
    done.says(str(path), error, "Fix it")
    assert "failed to load: broken" in command("plugins", "--plugin", path).out


def test_a_file_that_is_not_there_is_a_usage_error(command: Callable[..., Outcome], run_file: Callable[..., Path]) -> None:
    done = command("run", run_file(), "--plugin", "./nowhere.py")
    assert done.code == 2
    done.says("nowhere.py", "no such file", "--plugin")


# --- options -----------------------------------------------------------------------------------------------------


def test_options_are_the_keyword_only_parameters() -> None:
    def loss(step, unused=3, *, weight_of_it: float = 2.0, names: list[str] = ["a"], other: int):  # noqa: B006
        return step

    component = registry_of(loss=Component("loss", loss)).find("loss", "loss")
    fields = component.options_model().model_fields
    assert list(fields) == ["other", "weight_of_it", "names"]
    assert component.validate({"other": 3}, "loss.loss") == {"weight_of_it": 2.0, "names": ["a"], "other": 3}
    for options, words in [
        ({}, "loss.loss.other: is required"),
        ({"other": "x"}, "loss.loss.other: .*'x'"),
        ({"other": True}, "loss.loss.other: is true, but a number"),
        ({"other": 1, "names": [1]}, r"loss\.loss\.names\.0"),
        ({"other": 1, "unused": 1}, "no option 'unused'.*Its options: other, weight_of_it, names"),
        ({"othr": 1}, "no option 'othr'. Did you mean 'other'"),
    ]:
        with pytest.raises(UsageError, match=words):
            component.validate(options, "loss.loss")


def test_the_public_names_are_there() -> None:
    for name in saekit.__all__:
        assert getattr(saekit, name) is not None
    with pytest.raises(AttributeError, match="No saekit attribute Stepp"):
        saekit.Stepp  # noqa: B018


# --- what is installed, and one component ------------------------------------------------------------------------


def test_requirements_are_lines_for_pip(
    fakes: Fakes, command: Callable[..., Outcome], plugin_file: Callable[[str, str], Path]
) -> None:
    install(fakes)
    fakes.install("saekit-broken", "0.9", "broken", "broken_plugin", broken_plugin="raise RuntimeError")
    fakes.install("saekit-two", "2.0", "two_a", "broken_plugin")
    done = command("plugins", "--requirements", "--plugin", plugin_file("my_loss", HOYER))
    assert done.code == 0
    lines = done.out.splitlines()
    assert {"saekit-acme==0.3.1", "saekit-broken==0.9", "saekit-two==2.0"} <= set(lines)
    assert lines == sorted(set(lines)) and not [line for line in lines if "my_loss" in line]
    assert json.loads(command("plugins", "--requirements", "--json").out)


def test_show_says_all_of_a_component(
    fakes: Fakes, command: Callable[..., Outcome], plugin_file: Callable[[str, str], Path]
) -> None:
    targets = """
    from typing import Annotated, Literal
    from pydantic import Field

    def hoyer(step, *, power: Annotated[float, Field(gt=0, description="The exponent.")], over: Literal["mean", "max"] = "mean"):
        '''Squared Hoyer sparsity.'''
    """
    declares = DECLARES.format(name="hoyer", target="acme_targets:hoyer", summary="Acme.")
    declares = declares.replace("'Acme.')", "'Acme.', needs=('tokens', 'moonlight'), provides=('sparsity',))")
    fakes.install("saekit-acme", "0.3.1", "acme", "acme_plugin", acme_plugin=declares, acme_targets=targets)
    (shown,) = json.loads(command("plugins", "show", "hoyer", "--json").out)
    power, over = shown["options"]
    assert power == {"name": "power", "type": "float", "required": True, "default": None, "description": "The exponent."}
    assert over["default"] == "mean" and "Literal['mean', 'max']" in over["type"]
    assert "builtin.text" in shown["needs"]["tokens"] and shown["needs"]["moonlight"] == []
    assert (shown["distribution"], shown["version"], shown["source"]) == ("saekit-acme", "0.3.1", "acme_targets:hoyer")
    plain = command("plugins", "show", "acme.hoyer").out
    for words in ("power (float, required)", "The exponent.", "default 'mean'", "needs 'moonlight': provided by nothing",
                  "provides sparsity", "saekit-acme 0.3.1", "acme_targets:hoyer"):  # fmt: skip
        assert words in plain
    path = plugin_file("my_loss", HOYER)
    (mine,) = json.loads(command("plugins", "--plugin", path, "show", "my_loss.hoyer", "--json").out)
    assert mine["source"] == str(path)
