'''What the author of a plugin writes: a `Component` for each part that the plugin offers.

The shortest whole plugin is one file:

    from saekit import Component, hookimpl

    def hoyer(step, *, eps: float = 1e-8):
        """Squared Hoyer sparsity of each row's code."""
        return (step.code.sum() ** 2 / (step.code.square_sum() + eps)).mean()

    @hookimpl
    def saekit_losses():
        yield Component("hoyer", hoyer)

`saekit run --plugin hoyer.py --loss hoyer:eps=1e-6` uses it. The options of a component are the keyword-only parameters of
its target. Nothing is declared twice: validation, `saekit plugins show`, completion and the JSON Schema read the signature.

In an installed package the target is a string, so that listing names imports nothing heavy, and an entry point names the
module: `[project.entry-points.saekit]`, `acme = "saekit_acme"`. `saekit new loss NAME` writes such a package.
'''

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Component:
    """One named part that a plugin offers.

    name: what a run file says after `use =`.
    target: `"package.module:Object"`, imported when a run names it; in a file given with `--plugin`, the object itself.
    summary: one line for listings; by default the first line of the docstring of a target that is given as an object.
    needs: what it cannot work without (`"labels"`, `"subject_model"`, `"sequences"`, ...).
    provides: what it makes available to others; checked against `needs` before anything is loaded.
    default: whether it joins every run that provides what it needs, unless the run file says `defaults = false`.
    """

    name: str
    target: str | Callable[..., Any]
    summary: str = ""
    needs: tuple[str, ...] = ()
    provides: tuple[str, ...] = ()
    default: bool = False


@dataclass(frozen=True)
class OfKind:
    """Annotates the type `ComponentOption` of an option with the kind of component that it names."""

    name: str
