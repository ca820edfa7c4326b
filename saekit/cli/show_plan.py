"""How a plan is shown by `saekit run --dry-run`."""

from __future__ import annotations

from typing import Any

from saekit.config import ArchitectureUse
from saekit.files import to_jsonable
from saekit.runner.plan import Part, RunPlan
from saekit.terminal.output import echo, wrapped


def plan_as_json(plan: RunPlan) -> dict[str, Any]:
    """The plan as one JSON document: the resolved run file, each part's origin, and what is known of the source.

    With variants, each has its own resolved run file and parts."""
    return {
        "config": plan.config.model_dump(mode="json", by_alias=True),
        "parts": [_part(p) for p in (*([plan.source] if plan.config.variant else plan.members[0].parts), *plan.comparisons)],
        "variants": {
            member.variant: {
                "config": member.config.model_dump(mode="json", by_alias=True),
                "parts": [_part(part) for part in member.parts],
            }
            for member in plan.members
            if member.variant
        },
        "steps": plan.total_steps,
        "source": to_jsonable(plan.facts),
        "warnings": plan.warnings,
    }


def _part(part: Part) -> dict[str, Any]:
    return {
        "key": part.key,
        "component": part.component.qualified_name,
        "distribution": part.component.distribution,
        "version": part.component.version,
        "options": to_jsonable(part.options),
    }


def print_plan(plan: RunPlan) -> None:
    """The plan on stdout: the parts of each SAE with their options, and what the SAEs share."""
    whose = f"Plan of {plan.config.recipe or 'the run'}"
    for member in plan.members:
        own = [] if plan.config.variant else plan.comparisons
        _print_parts(whose + (f", variant {member.variant}" if member.variant else ""), [*member.parts, *own])
        training = member.config.training
        echo(f"{plan.total_steps} steps of {training.batch_size} activations, {training.tokens:,} in all; seed {training.seed}.")
    if plan.config.variant and plan.comparisons:
        echo()
        _print_parts(f"{whose}, all variants together", plan.comparisons)
    for name, value in plan.facts.items():
        echo(wrapped(f"{name}: {value}", rest="  "))
    for warning in plan.warnings:
        echo(wrapped(f"warning: {warning}", rest="  "))


def _print_parts(title: str, parts: list[Part]) -> None:
    """Each part: its key, its component with where that comes from, and its options below."""
    echo(f"{title}\n", bold=True)
    column = max(len(part.key) for part in parts)
    for part in parts:
        component = part.component
        origin = f"[{component.distribution} {component.version}]".replace(" ", "\xa0")
        echo(wrapped(f"{component.name} {origin}", f"  {part.key:<{column}}  ", " " * (column + 4)))
        options = ", ".join(f"{name}={value!r}" for name, value in _options(part).items())
        if options:
            echo(wrapped(options, "      ", "      "))
    echo()


def _options(part: Part) -> dict[str, Any]:
    """The part's options after what its entry in the run file holds beside them."""
    weight = getattr(part.entry, "weight", None)
    beside: dict[str, Any] = {} if weight is None else {"weight": weight}
    if isinstance(part.entry, ArchitectureUse):
        beside["d_sae"] = part.entry.d_sae
    return beside | part.options
