"""How the conformance matrix reaches each library."""

import os
import sys

from unidrop.conformance.remote import BACKEND_ENV_VAR

if BACKEND_ENV_VAR in os.environ:  # nothing but a backend lives here
    # Keras and TensorFlow import these where they are installed, for what no layer needs. It takes
    # about as long as all else of Keras.
    for _package in ("matplotlib", "sklearn"):
        sys.modules.setdefault(_package, None)  # type: ignore[arg-type] # it says: not installed
