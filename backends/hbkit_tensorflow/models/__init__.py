"""Click models: ``model(dense, embeddings)`` gives logits, from dense inputs and one row for each feature.

Dense inputs pass `SignedLog` first. Dense layers start with Glorot-uniform weights and zero bias. The models take the
same arguments in every framework, and their weights stand in the same order.
"""

from __future__ import annotations

from hbkit_tensorflow.layers import serializable
from hbkit_tensorflow.models.common import ClickModel
from hbkit_tensorflow.models.dcnv2 import DCNv2
from hbkit_tensorflow.models.deepfm import DeepFM
from hbkit_tensorflow.models.din import DIN
from hbkit_tensorflow.models.dlrm import DLRM
from hbkit_tensorflow.models.mmoe import MMoE
from hbkit_tensorflow.models.pnn import PNN
from hbkit_tensorflow.models.xdeepfm import XDeepFM

__all__ = ["DIN", "DLRM", "MODELS", "PNN", "DCNv2", "DeepFM", "MMoE", "XDeepFM"]

MODELS: dict[str, type[ClickModel]] = {
    "dlrm": DLRM,
    "deepfm": DeepFM,
    "xdeepfm": XDeepFM,
    "dcnv2": DCNv2,
    "pnn": PNN,
    "mmoe": MMoE,
    "din": DIN,
}

for _kind in MODELS.values():
    serializable(_kind)
