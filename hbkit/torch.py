"""hbkit for PyTorch: ``import hbkit.torch as hb``. The names are those of `hbkit_torch`."""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as e:
    if e.name != "torch":
        raise  # torch is there and broken, which installing the extra would not mend
    raise ImportError("hbkit.torch needs PyTorch: pip install 'hbkit[torch]'") from e

from hbkit_torch import *  # noqa: F403
from hbkit_torch import __all__ as __all__
