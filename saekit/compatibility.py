"""What plugins may rely on: the version of the contract, what each version changed, and what is on its way out.

The contract is `saekit.hookspecs`, `saekit.protocols`, `saekit.Component` and the names in `saekit.__all__`. What is added to
it breaks nobody, since a hook is passed only the arguments that it names and what is optional is asked for. So its version
rises only where a plugin may have to change, and what is to go is deprecated for at least one version before.
"""

from __future__ import annotations

CONTRACT = 1
"""The version of the contract between saekit and its plugins. A plugin may say which one it was made for with
`SAEKIT_CONTRACT = 1` in the module that its entry point names."""
OLDEST = 1
"""The oldest version for which a plugin may be made and still work."""
DECLARATION = "SAEKIT_CONTRACT"
"""The attribute of a plugin's module that says which version it was made for."""

CHANGES: dict[int, str] = {1: "The first version."}
"""What each version changed, in sentences for the author of a plugin: what to write instead of what."""

DEPRECATED_FIELDS: dict[str, str] = {}
"""Fields of `Component` that are on their way out, each with what to write instead."""


def deprecated(what: str, *, since: int, instead: str) -> DeprecationWarning:
    """What a specification says of a hook or an argument that is on its way out; the core names the plugin that uses it.

    For a hook `@hookspec(warn_on_impl=deprecated(...))`, for arguments `@hookspec(warn_on_impl_args={"name": deprecated(...)})`.
    """
    return DeprecationWarning(f"{what} is deprecated since contract {since}. {instead}")


def refused(made_for: int) -> str | None:
    """Why a plugin that was made for this version of the contract cannot be used; None where it can."""
    if made_for > CONTRACT:
        return f"it was made for contract {made_for}, but this saekit has contract {CONTRACT}."
    if made_for < OLDEST:
        return f"it was made for contract {made_for}, and saekit supports {OLDEST} to {CONTRACT}. {changes_since(made_for)}"
    return None


def changes_since(made_for: int) -> str:
    """What a plugin that was made for an earlier version must know, in one paragraph; empty for one that is up to date."""
    return " ".join(f"Contract {n}: {CHANGES[n]}" for n in range(max(made_for, 0) + 1, CONTRACT + 1))
