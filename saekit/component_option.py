"""`ComponentOption`: an option that names a component, which has options too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, PrivateAttr, model_validator

from saekit.errors import ComponentError, UsageError

if TYPE_CHECKING:
    from saekit.plugins import Registry
    from saekit.registered import RegisteredComponent


class ComponentOption(BaseModel):
    """The type of an option that names a component.

    `base: Annotated[ComponentOption, OfKind("architecture")] = ComponentOption(use="topk")`

    A run file says `base = "topk"`, or `base = {use = "topk", k = 32}`. The target receives it with the component found and
    its options checked. That component's `needs` are checked like all others, and what it `provides` counts.
    """

    model_config = ConfigDict(
        extra="allow",
        frozen=True,
        protected_namespaces=(),
        json_schema_extra=lambda schema: schema.update(anyOf=[{"type": "string"}, {"type": "object"}], type=None),
    )

    use: str
    _component: RegisteredComponent | None = PrivateAttr(default=None)
    _options: dict[str, Any] = PrivateAttr(default_factory=dict)
    _option: str = PrivateAttr(default="")

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        return {"use": given} if isinstance(given, str) else given

    @property
    def component(self) -> RegisteredComponent:
        """The component that it names."""
        if self._component is None:
            raise UsageError(f"{self.use!r} has not been looked up yet; that happens when options are validated.")
        return self._component

    @property
    def options(self) -> dict[str, Any]:
        """Its options, checked, with defaults filled in."""
        return self._options

    def build(self, *args: Any) -> Any:
        """The component, ready to use; see `RegisteredComponent.build`."""
        try:
            return self.component.build(self.options, *args)
        except ComponentError as error:
            raise error.within(self._option) from error

    def resolved(self, registry: Registry, kind: str, where: str) -> ComponentOption:
        """The same with the component found. UsageError or PluginError, as for a component that the run file names."""
        component = registry.find(kind, self.use, where=where)
        given = self.model_extra or {}
        found = ComponentOption(use=self.use, **given)
        found._component, found._options = component, component.validate(given, where)
        found._option = where.rpartition(".")[2]
        return found

    def fits(self, made: Any) -> bool:
        """Whether `made`, a saved `to_dict()`, has this component and every option that is given here."""
        if not isinstance(made, dict) or made.get("use") != self.component.qualified_name:
            return False
        stated = {name: self.options[name] for name in self.model_extra or {}}
        return all(fits(value, made[name]) for name, value in stated.items() if name in made)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a file: the qualified name and every option."""
        plain = {name: value.to_dict() if isinstance(value, ComponentOption) else value for name, value in self.options.items()}
        return {"use": self.component.qualified_name, **plain}


def fits(option: Any, made: Any) -> bool:
    """Whether an option equals its saved value; a `ComponentOption` is saved as its `to_dict()`."""
    return option.fits(made) if isinstance(option, ComponentOption) else option == made
