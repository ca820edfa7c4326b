"""saekit: train sparse autoencoders on the activations of neural networks, and ask questions of what they found.

Everything public is declared in `__init__.pyi`. Each name is imported when it is first used, so `import saekit` costs nothing
and imports no torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
