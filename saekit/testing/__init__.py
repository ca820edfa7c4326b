"""For authors of plugins: conformance checks for every kind of component, and helpers for tests.

Everything public is listed in `__init__.pyi`. Each name is imported when it is first used, so
`saekit.testing.pytest_plugin`, which pytest loads by itself, costs nothing unless it is used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
