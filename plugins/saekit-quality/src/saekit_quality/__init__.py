"""saekit-quality: learns an embedding in which good responses lie together, and gives it to SAEs.

What programs use is declared in `__init__.pyi` and imported on first use, so that saekit finds the plugin without torch.
"""

import lazy_loader

# Without its __dir__: looking for hooks would import every name.
__getattr__, _, __all__ = lazy_loader.attach_stub(__name__, __file__)
