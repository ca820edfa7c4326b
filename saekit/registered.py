"""A component as the registry knows it: who ships it, its target, its options."""

from __future__ import annotations

import contextlib
import functools
import inspect
import pkgutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from saekit.component import Component, OfKind
from saekit.errors import PluginError, SaekitError, UsageError, near_names
from saekit.options import options_model, validation_lines
from saekit.process_state import kept

if TYPE_CHECKING:
    from pydantic import BaseModel

    from saekit.plugins import Registry

OWN_DISTRIBUTION = "saekit"


@dataclass(frozen=True, kw_only=True)
class RegisteredComponent(Component):
    """A component with its kind, and the plugin, distribution and version it comes from.

    registry: where the components that its options name are found.
    """

    kind: str
    plugin: str
    distribution: str
    version: str
    registry: Registry = field(compare=False, repr=False)

    @property
    def qualified_name(self) -> str:
        """`plugin.name`, which is never ambiguous."""
        return f"{self.plugin}.{self.name}"

    @property
    def origin(self) -> str:
        """Who ships it, for messages: `loss 'infonce' of plugin 'contrastive' (saekit-contrastive 0.1.0)`."""
        return f"{self.kind} {self.name!r} of plugin {self.plugin!r} ({self.distribution} {self.version})".rstrip()

    @property
    def title(self) -> str:
        """`loss 'mse'`, and who ships it unless that is saekit itself."""
        return self.origin if self.distribution != OWN_DISTRIBUTION else f"{self.kind} {self.name!r}"

    def load(self) -> Any:
        """Import and return the target. Raises PluginError, with the cause, if that fails."""
        if not isinstance(self.target, str):
            return self.target
        try:
            if ":" not in self.target:
                raise ValueError("it names no object; write package.module:Object")
            # stdout may be carrying a JSON document
            with contextlib.redirect_stdout(sys.stderr), kept(self.origin, self.registry.warn):
                return pkgutil.resolve_name(self.target)
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"{self.origin} cannot be loaded from {self.target!r}: {type(error).__name__}: {error}. "
                f"Fix or upgrade {self.distribution}, or leave {self.name!r} out of the run."
            ) from error

    def options_model(self) -> type[BaseModel]:
        """A pydantic model of the options, one field for each keyword-only parameter of the target."""
        return options_model(self.load(), self.name, self.origin)

    def validate(self, options: Mapping[str, Any], where: str) -> dict[str, Any]:
        """`options` checked and converted; `where` is the key they came from, such as `loss.infonce`."""
        from pydantic import ValidationError

        fields = self.options_model().model_fields
        for key in options:
            if key not in fields:
                raise UsageError(
                    f"{where}.{key}: {self.kind} {self.name!r} has no option {key!r}.{near_names(key, fields)} "
                    f"Its options: {', '.join(fields) or 'none'} (see: saekit plugins show {self.name})."
                )
        try:
            with kept(self.origin, self.registry.warn):
                checked = self.options_model()(**options)
        except ValidationError as error:
            raise UsageError("\n".join(validation_lines(error, where, options))) from None
        except SaekitError:
            raise
        except (Exception, SystemExit) as error:
            raise PluginError(f"{where}: {self.origin} failed to check its options: {type(error).__name__}: {error}.") from error
        values = {name: getattr(checked, name) for name in fields}
        for name, info in fields.items():
            for mark in info.metadata:
                if isinstance(mark, OfKind) and values[name] is not None:
                    values[name] = values[name].resolved(self.registry, mark.name, f"{where}.{name}")
        return values

    def build(self, options: Mapping[str, Any], *args: Any) -> Any:
        """The component, ready to use: an instance if the target is a class, otherwise the function with its options bound."""
        target = self.load()
        try:
            if inspect.isclass(target):
                with kept(self.origin, self.registry.warn):
                    return target(*args, **options)
        except UsageError:
            raise
        except (Exception, SystemExit) as error:
            raise PluginError(f"{self.origin} could not be built: {type(error).__name__}: {error}") from error
        if args:
            raise PluginError(f"{self.origin}: its target must be a class.")
        return functools.partial(target, **options) if options else target
