"""What plugins may rely on: the version of the contract, what each version changed, and what is deprecated.

The contract is `saekit.hookspecs`, `saekit.protocols`, `saekit.Component` and the names in `saekit.__all__`. An addition
breaks no plugin, since a hook receives only the arguments that it names, and optional methods are looked up. So the version
rises only when a plugin may have to change, and what will be removed is deprecated for at least one version before.
"""

from __future__ import annotations

CONTRACT = 2
"""The version of the contract between saekit and its plugins. A plugin may say which one it was made for:
`SAEKIT_CONTRACT = 2` in the module that its entry point names."""
OLDEST = 2
"""Plugins that were made for this version or a later one work."""
DECLARATION = "SAEKIT_CONTRACT"
"""The attribute of a plugin's module that says which version it was made for."""

CHANGES: dict[int, str] = {
    1: "The first version.",
    2: (
        "saekit.contracts is now saekit.protocols, and saekit.plain is now saekit.to_jsonable. "
        "saekit.Choice and saekit.Kind are now saekit.ComponentOption and saekit.OfKind. "
        "Component has only the six fields that a plugin sets; in tests write registry_of(loss=Component(...)). "
        "Listeners are given saekit.Training and saekit.RunInfo, and have only what these document. "
        "`number` is the number of a step in every hook: in checkpoint_saved it was the number of steps done, one more. "
        "A component refuses an option with saekit.OptionError(option, message), and named_function takes the option's name; "
        "neither needs the key of the run file. "
        "An architecture keeps its options as attributes in place of `options()`, and its names and conversions for other "
        "libraries in a saekit.SaeLensFormat in place of class variables."
    ),
}
"""What each version changed, in sentences for the author of a plugin: what to write instead of what."""

DEPRECATED_FIELDS: dict[str, str] = {}
"""Deprecated fields of `Component`, each with what to write instead."""


def deprecated(what: str, *, since: int, instead: str) -> DeprecationWarning:
    """A warning for a hook or an argument that will be removed; the core names the plugin that uses it.

    For a hook write `@hookspec(warn_on_impl=deprecated(...))`, and for an argument
    `@hookspec(warn_on_impl_args={"name": deprecated(...)})`.
    """
    return DeprecationWarning(f"{what} is deprecated since contract {since}. {instead}")


def refused(made_for: int) -> str | None:
    """Why a plugin made for this version of the contract cannot be used; None if it can."""
    if made_for > CONTRACT:
        return f"it was made for contract {made_for}, but this saekit has contract {CONTRACT}."
    if made_for < OLDEST:
        return f"it was made for contract {made_for}, and saekit supports {OLDEST} to {CONTRACT}. {changes_since(made_for)}"
    return None


def changes_since(made_for: int) -> str:
    """What has changed for a plugin made for an earlier version, in one paragraph; empty if it is up to date."""
    return " ".join(f"Contract {n}: {CHANGES[n]}" for n in range(max(made_for, 0) + 1, CONTRACT + 1))
