"""How a plan is shown by `saekit run --dry-run`."""

from __future__ import annotations

from typing import Any

from saekit.files import to_jsonable
from saekit.runner.plan import Part, RunPlan, SAEPlan
from saekit.terminal import output


def plan_as_json(plan: RunPlan) -> dict[str, Any]:
    """The plan as one JSON document: the resolved run file, each part's origin, and what is known of the source.

    With variants, each has its own resolved run file and parts."""
    return {
        "config": plan.config.model_dump(mode="json", by_alias=True),
        "parts": [_part(part) for part in (plan.members[0].parts if not plan.config.variant else [plan.source])],
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
    """The plan on stdout: a table for each SAE, and what they share."""
    console = output.console()
    for member in plan.members:
        console.print(_table(member))
        training = member.config.training
        console.print(
            f"{plan.total_steps} steps of {training.batch_size} activations, {training.tokens:,} in all; seed {training.seed}."
        )
    for name, value in plan.facts.items():
        console.print(f"{name}: {value}", highlight=False, markup=False)
    for warning in plan.warnings:
        console.print(f"warning: {warning}", highlight=False, markup=False)


def _table(plan: SAEPlan) -> Any:
    from rich.markup import escape
    from rich.table import Table

    title = f"Plan of {plan.config.recipe or 'the run'}" + (f", variant {plan.variant}" if plan.variant else "")
    table = Table(title=title, title_justify="left", show_lines=False)
    for column in ("key", "component", "options", "from"):
        table.add_column(column, overflow="fold")
    for part in plan.parts:
        options = ", ".join(f"{k}={v!r}" for k, v in part.options.items())
        weight = getattr(part.entry, "weight", None)
        if weight is not None:
            options = f"weight={weight!r}" + (f", {options}" if options else "")
        if part.key == "architecture":
            options = f"d_sae={plan.config.architecture.d_sae}" + (f", {options}" if options else "")
        origin = f"{part.component.distribution} {part.component.version}"
        table.add_row(*map(escape, (part.key, part.component.name, options, origin)))
    return table
