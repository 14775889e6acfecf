"""Metrics of tensors are the core's."""

import numpy as np
import pytest
import torch

import hbkit.torch as hb
from hbkit import metrics


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["AUC", "GAUC", "LogLoss"])
def test_metric_of_tensors_is_that_of_arrays(name, dtype):
    torch.manual_seed(0)
    label, score = torch.randint(0, 2, (500,)), torch.rand(500, requires_grad=True).to(dtype)
    weight, group = torch.rand(500), torch.randint(0, 20, (500,))
    more = (group,) if name == "GAUC" else ()
    ours, core = getattr(hb.metrics, name)(), getattr(metrics, name)()
    ours.update(label, score, weight, *more)
    core.update(label.numpy(), score.detach().float().numpy(), weight.numpy(), *(g.numpy() for g in more))
    assert ours.result() == core.result() == pytest.approx(0.5 if name != "LogLoss" else 1.0, abs=0.1)


def test_metric_of_tensors_merges_with_one_of_arrays():
    ours, core = hb.metrics.AUC(), metrics.AUC()
    ours.update(torch.tensor([0, 1]), torch.tensor([0.1, 0.9]))
    core.update(np.array([0, 1]), np.array([0.5, 0.2]))
    assert ours.merge(core).result() == pytest.approx(0.75)
