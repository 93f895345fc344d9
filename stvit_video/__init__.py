"""Spatiotemporal semantic tokens for video transformers.

Importing the package is cheap: torch is imported only by the modules that need it.
"""

import os
import signal
import sys
import warnings

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"] and any(word.startswith(__name__) for word in sys.orig_argv):
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # Ctrl-C before a command begins has no traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # ``python -m`` looks for modules in the current folder first, which may hold other people's files: numpy.py.
    _here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    sys.path[:1] = [folder for folder in sys.path[:1] if folder == _here or os.path.abspath(folder) != os.getcwd()]

# PyTorchVideo, as it is imported, calls what torch has given notice of: nothing that a user could change.
warnings.filterwarnings("ignore", message=r"`torch\.jit")
