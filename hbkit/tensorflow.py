"""hbkit for TensorFlow and Keras 3: ``import hbkit.tensorflow as hb``. The names are those of `hbkit_tensorflow`."""

import os
import sys

from hbkit import errors


def _require_backend(name: str) -> None:
    if name != "tensorflow":
        raise errors.Unsupported(
            f"hbkit.tensorflow under Keras's backend {name!r}",
            remedy="set KERAS_BACKEND=tensorflow before Keras is imported",
        )


# Keras imports its backend when it is first imported, which importing TensorFlow does: so look before.
if "keras" not in sys.modules:
    _require_backend(os.environ.get("KERAS_BACKEND", "tensorflow"))

try:
    import tensorflow as _tensorflow  # noqa: F401 only to see that it is there
except ModuleNotFoundError as e:
    if e.name != "tensorflow":
        raise  # TensorFlow is there and broken, which installing the extra would not mend
    raise ImportError("hbkit.tensorflow needs TensorFlow: pip install 'hbkit[tensorflow]'") from e

import keras as _keras  # noqa: E402 after the check above

_require_backend(_keras.config.backend())

from hbkit_tensorflow import *  # noqa: E402, F403 a door: all names, after the checks
from hbkit_tensorflow import __all__ as __all__  # noqa: E402 after the checks
