"""hbkit for PyTorch: ``import hbkit.torch as hb``. The names are those of `hbkit_torch`."""

try:
    import torch as _torch  # noqa: F401 only to see that it is there
except ModuleNotFoundError as e:
    if e.name != "torch":
        raise  # torch is there and broken, which installing the extra would not mend
    raise ImportError("hbkit.torch needs PyTorch: pip install 'hbkit[torch]'") from e

from hbkit_torch import *  # noqa: F403 a door: all names
from hbkit_torch import __all__ as __all__
