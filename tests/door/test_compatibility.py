"""What plugins may rely on: hooks gain arguments without breaking anyone, and what is to go is said before it goes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import Fakes, Outcome, listener_plugin

import saekit
from saekit import compatibility
from saekit.component import Component
from saekit.errors import PluginError
from saekit.hookspecs import Declaring, Lifecycle, hookimpl, hookspec
from saekit.listeners import Listener, Listeners
from saekit.plugins import Plugin, Registry

DECLARES = """
from saekit import Component, hookimpl
{contract}

@hookimpl
def saekit_losses():
    yield Component("thing", "saekit.builtin.losses:mse", "A loss.")
"""


class NextLifecycle(Lifecycle):
    """As a later version may have it: a hook with one more argument, one on its way out, an argument on its way out."""

    @hookspec
    def step_ended(self, trainer, number, batch):
        """It has gained `batch`."""

    @hookspec(warn_on_impl=compatibility.deprecated("The hook gradients_ready", since=2, instead="Use step_ended."))
    def gradients_ready(self, trainer, number):
        """It is to go."""

    @hookspec(
        warn_on_impl_args={
            "number": compatibility.deprecated("number of step_started", since=2, instead="Read trainer.number.")
        }
    )
    def step_started(self, trainer, number):
        """Its `number` is to go."""


class NextDeclaring(Declaring):
    """As a later version may have it: losses are declared in another way."""

    @hookspec(warn_on_impl=compatibility.deprecated("The hook saekit_losses", since=2, instead="Use saekit_terms."))
    def saekit_losses(self):
        """It is to go."""


NOW = compatibility.CONTRACT
NEXT = NOW + 1


@pytest.fixture
def next_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were one more version of the contract."""
    monkeypatch.setattr(compatibility, "CONTRACT", NEXT)
    monkeypatch.setitem(compatibility.CHANGES, NEXT, "step_ended has gained batch.")


def install(fakes: Fakes, contract: str = "") -> None:
    source = DECLARES.format(contract=contract)
    fakes.install("saekit-acme", "0.3.1", "acme", "acme_plugin", acme_plugin=source)


def only(registry: Registry, name: str) -> Plugin:
    (plugin,) = [p for p in registry.plugins if p.name == name]
    return plugin


# --- the version -------------------------------------------------------------------------------------------------


def test_the_version_is_public_and_each_has_its_changes() -> None:
    assert compatibility.CONTRACT == saekit.CONTRACT
    assert sorted(compatibility.CHANGES) == list(range(1, compatibility.CONTRACT + 1))
    assert 1 <= compatibility.OLDEST <= compatibility.CONTRACT


def test_a_plugin_that_is_up_to_date_or_says_nothing_is_left_in_peace(fakes: Fakes) -> None:
    install(fakes, f"SAEKIT_CONTRACT = {compatibility.CONTRACT}")
    registry = Registry()
    assert only(registry, "acme").contract == compatibility.CONTRACT
    registry.find("loss", "thing")
    assert registry.warnings == [] and only(registry, "acme").warnings == []
    assert only(registry, "builtin").contract is None


def test_one_that_was_made_for_an_earlier_version_is_told_what_changed(
    fakes: Fakes, next_contract: None, command: Callable[..., Outcome], run_file: Callable[..., Path]
) -> None:
    install(fakes, f"SAEKIT_CONTRACT = {NOW}")
    listed = {p["name"]: p for p in json.loads(command("plugins", "--json").out)["plugins"]}
    assert listed["acme"]["contract"] == NOW and listed["acme"]["error"] is None
    assert f"Contract {NEXT}: step_ended has gained batch." in listed["acme"]["warnings"][0]
    assert f"plugin 'acme' (saekit-acme 0.3.1): was made for contract {NOW}" in command("plugins").out
    plan = json.loads(command("run", run_file(loss=[{"use": "thing"}]), "--dry-run", "--json").out)
    (warning,) = plan["warnings"]
    for words in ("plugin 'acme' (saekit-acme 0.3.1)", f"contract {NOW}", f"now {NEXT}", "gained batch", "Upgrade saekit-acme"):
        assert words in warning
    assert json.loads(command("run", run_file(), "--dry-run", "--json").out)["warnings"] == []


def test_one_that_is_too_old_or_too_new_is_refused_where_it_is_named(
    fakes: Fakes, next_contract: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compatibility, "OLDEST", NEXT)
    install(fakes, f"SAEKIT_CONTRACT = {NOW}")
    with pytest.raises(
        PluginError,
        match=rf"saekit-acme 0\.3\.1.*contract {NOW}, and saekit supports {NEXT} to {NEXT}.*gained batch.*upgrade saekit-acme",
    ):
        Registry().find("loss", "thing")
    assert Registry().find("loss", "mse").plugin == "builtin"
    monkeypatch.setattr(compatibility, "OLDEST", 1)
    monkeypatch.setattr(compatibility, "CONTRACT", NOW - 1)
    with pytest.raises(
        PluginError, match=rf"made for contract {NOW}, but this saekit has contract {NOW - 1}\. Upgrade saekit, install an earlier"
    ):
        Registry().find("loss", "thing")


def test_a_plugin_of_the_first_contract_is_told_what_to_change(fakes: Fakes) -> None:
    install(fakes, "SAEKIT_CONTRACT = 1")
    with pytest.raises(PluginError, match=r"made for contract 1, .*Contract 2: .*saekit\.protocols.*upgrade saekit-acme"):
        Registry().find("loss", "thing")


# --- arguments and hooks -----------------------------------------------------------------------------------------


def test_a_hook_that_gains_an_argument_still_calls_those_that_do_not_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saekit.listeners.Lifecycle", NextLifecycle)
    heard = []

    class Old:
        @hookimpl
        def step_ended(self, number):
            heard.append(("old", number))

    class New:
        @hookimpl
        def step_ended(self, batch, trainer):
            heard.append(("new", batch, trainer))

    listeners = Listeners()
    listeners.add(Listener("old", Old(), "callback 'old'", vital=True))
    listeners.add(Listener("new", New(), "callback 'new'", vital=True))
    listeners.emit("step_ended", trainer="t", number=7, batch="b")
    assert heard == [("old", 7), ("new", "b", "t")]
    assert listeners.outdated == []


LISTENS = """
@hookimpl
def gradients_ready(self, trainer):
    self.heard = True

@hookimpl
def step_started(self, trainer, number):
    assert number == trainer.number
"""


def test_a_listener_of_what_is_deprecated_works_and_the_run_says_whose_it_is(
    command: Callable[..., Outcome],
    run_file: Callable[..., Path],
    plugin_file: Callable[[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("saekit.listeners.Lifecycle", NextLifecycleAsCalled)
    path = plugin_file("aged", listener_plugin("callback", "aged", LISTENS))
    done = command("run", run_file(), "--plugin", path, "--callback", "aged", "--directory", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    warnings = [w for w in json.loads(done.out)["warnings"] if "deprecated" in w]
    assert len(warnings) == 2
    for words in ("The hook gradients_ready is deprecated since contract 2. Use step_ended.", "Read trainer.number."):
        (found,) = [w for w in warnings if words in w]
        assert "callback 'aged' of plugin 'aged'" in found and str(path) in found


class NextLifecycleAsCalled(NextLifecycle):
    """With `step_ended` as the loop of today calls it."""

    @hookspec
    def step_ended(self, trainer, number):
        """As it is."""


def test_a_deprecated_declaring_hook_works_and_names_plugin_and_distribution(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    install(fakes)
    monkeypatch.setattr("saekit.plugins.Declaring", NextDeclaring)
    registry = Registry()
    (told,) = only(registry, "acme").warnings
    assert told.startswith(
        "The hook saekit_losses is deprecated since contract 2. Use saekit_terms. Upgrade saekit-acme"
    )
    assert registry.warnings == []
    registry.find("loss", "thing")
    registry.find("loss", "thing")
    assert registry.warnings == [f"plugin 'acme' (saekit-acme 0.3.1): {told}"]
    assert not [w for w in recwarn if issubclass(w.category, DeprecationWarning) and "saekit" in str(w.message)]


def test_a_deprecated_field_of_a_component_works_and_names_plugin_and_distribution(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = DECLARES.format(contract="").replace('"A loss."', '"A loss.", provides=("moonlight",)')
    fakes.install("saekit-acme", "0.3.1", "acme", "acme_plugin", acme_plugin=source)
    monkeypatch.setitem(compatibility.DEPRECATED_FIELDS, "provides", "Say it in gives.")
    registry = Registry()
    assert registry.find("loss", "thing").provides == ("moonlight",)
    (told,) = only(registry, "acme").warnings
    assert "'thing' sets the field provides, which is deprecated. Say it in gives. Upgrade saekit-acme" in told
    assert f"plugin 'acme' (saekit-acme 0.3.1): {told}" in registry.warnings


def test_what_is_called_deprecated_is_there() -> None:
    assert compatibility.DEPRECATED_FIELDS.keys() <= {field.name for field in dataclasses.fields(Component)}
