"""What PyTorch makes of the models: run by test_agreement in a process without TensorFlow.

``python torch_side.py CONFIG.json OUT.npz``: for each configured model its parameters, inputs, logits and gradients.
"""

import inspect
import json
import sys

import numpy as np
import torch

import hbkit.torch as hb
from hbkit_torch.pipeline import Sequence

configs, out = json.loads(sys.argv[1]), {}
rng = np.random.default_rng(0)


def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)


for case, (name, n_dense, options) in configs.items():
    model = hb.models.MODELS[name](["a", "b", "c"], 4, n_dense, **options)
    starts = [parameter.detach().numpy().copy() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.from_numpy(0.5 * normal(*parameter.shape)))
    dense, rows = torch.from_numpy(np.exp(normal(6, n_dense))), {f: normal(6, model.row_dim(4)) for f in "abc"}
    leaves = {f: torch.from_numpy(x).requires_grad_() for f, x in rows.items()}
    embeddings = dict(leaves)
    for f in options.get("sequences", {}):
        leaves[f] = torch.from_numpy(normal(6, 5, 4)).requires_grad_()
        embeddings[f] = Sequence(leaves[f], torch.from_numpy(rng.random((6, 5)) < 0.5))
        out[f"{case}/mask/{f}"] = embeddings[f].mask.numpy()
    logits = model(dense, embeddings)
    factors = torch.from_numpy(normal(*logits.shape))
    (logits * factors).sum().backward()
    out |= {
        f"{case}/dense": dense.numpy(),
        f"{case}/logits": logits.detach().numpy(),
        f"{case}/factors": factors.numpy(),
    }
    with torch.no_grad():
        out[f"{case}/evaluated"] = model.eval()(dense, embeddings).numpy()
    out |= {f"{case}/start/{i}": start for i, start in enumerate(starts)}
    out |= {f"{case}/buffer/{i}": buffer.numpy() for i, buffer in enumerate(model.buffers())}
    for i, p in enumerate(model.parameters()):
        out |= {f"{case}/weight/{i}": p.detach().numpy(), f"{case}/weight_grad/{i}": p.grad.numpy()}
    for f, leaf in leaves.items():
        out |= {f"{case}/rows/{f}": leaf.detach().numpy(), f"{case}/rows_grad/{f}": leaf.grad.numpy()}
    out[f"{case}/arguments"] = np.array(
        [f"{p.name}={p.default}" for p in inspect.signature(type(model)).parameters.values()]
    )
np.savez(sys.argv[2], **out)
