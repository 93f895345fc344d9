"""Spatiotemporal semantic tokens for video transformers.

Importing the package is cheap: torch is imported only by the modules that need it.
"""

import warnings

__version__ = "0.1.0"

# PyTorchVideo, as it is imported, calls what torch has given notice of: nothing that a user could change.
warnings.filterwarnings("ignore", message=r"`torch\.jit")
