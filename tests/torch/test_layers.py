"""The layers against NumPy in float64, and their gradients against finite differences."""

import numpy as np
import pytest
import torch

import hbkit.torch as hb


def mlp(layers, x):
    """An MLP of linear layers with ReLU or Dice between them."""
    for layer in layers:
        if isinstance(layer, torch.nn.Linear):
            x = x @ array(layer.weight).T + (0 if layer.bias is None else array(layer.bias))
        else:
            x = dice(layer, x) if isinstance(layer, hb.nn.Dice) else np.maximum(x, 0)
    return x


def array(x):
    return x.detach().numpy().astype(np.float64)


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def dice(layer, x):
    axes = tuple(range(x.ndim - 1))
    p = 1 / (1 + np.exp(-(x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-8)))
    return p * x + (1 - p) * array(layer.slope) * x


def product(layer, x):
    pairs = [(x[:, i] * x[:, j]).sum(1) for i in range(x.shape[1]) for j in range(i)]
    return np.concatenate([x.reshape(len(x), -1), np.stack(pairs, 1)], 1)


def cross(layer, x):
    crossed = x
    for one in layer.layers:
        crossed = x * mlp([one], crossed) + crossed
    return crossed


def compressed(layer, x):
    crossed, sums = x, []
    for one in layer.layers:
        weight = array(one.weight).reshape(-1, crossed.shape[1], x.shape[1])
        crossed = np.einsum("hij,bid,bjd->bhd", weight, crossed, x)
        sums.append(crossed.sum(2))
    return np.concatenate(sums, 1)


def mixture(layer, x):
    experts = np.stack([mlp(expert, x) for expert in layer.experts], 1)
    gates = np.stack([softmax(mlp([gate], x)) for gate in layer.gates], 1)
    return np.einsum("bte,bew->btw", gates, experts)


def attention(layer, target, values, mask):
    out, row = np.zeros_like(target), np.nonzero(mask)[0]
    t, v = target[row], values[mask]  # each key that there is
    np.add.at(out, row, mlp(layer.score, np.concatenate([t, v, t - v, t * v], 1)) * v)
    return out


MASK = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0], [0, 1, 1]], bool)
LAYERS = {  # a layer, its oracle and the shapes of its inputs
    "MLP": (lambda: hb.nn.MLP(3, [5, 2]), mlp, [(4, 3)]),
    "Dice": (lambda: hb.nn.Dice(3), dice, [(4, 2, 3)]),
    "ProductLayer": (lambda: hb.nn.ProductLayer(), product, [(4, 3, 2)]),
    "CrossNetwork": (lambda: hb.nn.CrossNetwork(5, 3), cross, [(4, 5)]),
    "CompressedInteraction": (lambda: hb.nn.CompressedInteraction(3, [4, 2]), compressed, [(4, 3, 2)]),
    "MixtureOfExperts": (lambda: hb.nn.MixtureOfExperts(5, 2, 3, [4, 3]), mixture, [(4, 5)]),
    "TargetAttention": (lambda: hb.nn.TargetAttention(2, [4]), attention, [(4, 2), (4, 3, 2), MASK]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_its_formula_and_its_gradient_that_of_finite_differences(name):
    make, oracle, shapes = LAYERS[name]
    torch.manual_seed(0)
    layer, rng = make(), np.random.default_rng(0)
    for parameter in layer.parameters():  # the biases too, which start as zeros
        torch.nn.init.normal_(parameter)
    inputs = [shape if shape is MASK else rng.normal(size=shape) for shape in shapes]
    single = [torch.from_numpy(x if x.dtype == bool else x.astype(np.float32)) for x in inputs]
    found = layer(*single)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.detach(), oracle(layer, *inputs), rtol=1e-4, atol=1e-5)
    double = [torch.from_numpy(x).requires_grad_(x.dtype != bool) for x in inputs]
    parameters = [p.detach().double().requires_grad_() for p in layer.parameters()]
    names = [name for name, _ in layer.named_parameters()]

    def of_everything(*args):
        return torch.func.functional_call(layer, dict(zip(names, args, strict=False)), args[len(names) :])

    assert torch.autograd.gradcheck(of_everything, (*parameters, *double), raise_exception=True)


def test_target_attention_does_not_see_what_is_masked():
    layer, target = hb.nn.TargetAttention(2, [4]), torch.randn(4, 2)
    values, mask = torch.randn(4, 3, 2, requires_grad=True), torch.from_numpy(MASK)
    out = layer(target, values, mask)
    other = layer(target, torch.where(mask.unsqueeze(2), values, 7.0), mask)
    assert torch.equal(out, other) and not out[2].any()
    out.sum().backward()
    assert not values.grad[~mask].any() and values.grad[mask].any(1).all()


def test_dice_evaluates_by_the_moments_of_the_last_batches():
    layer, rng = hb.nn.Dice(2), np.random.default_rng(0)
    torch.nn.init.normal_(layer.slope)
    batches = [torch.from_numpy(rng.normal([1, -2], [3, 0.5], (50, 2)).astype(np.float32)) for _ in range(3)]
    x = batches[0]
    before = layer.eval()(x)
    layer.train()(x, torch.zeros(50, dtype=torch.bool))  # nothing counts
    assert torch.equal(layer.eval()(x), before)
    trained = layer.train()(x)
    torch.testing.assert_close(layer.eval()(x), trained)  # one batch: its own moments
    assert torch.equal(layer(x[:7]), layer(x)[:7])  # whatever else is in the batch
    for batch in batches[1:]:
        layer.train()(batch)
    weights = np.array([0.081, 0.09, 0.1])
    mean = sum(w * b.numpy().mean(0) for w, b in zip(weights, batches, strict=True)) / weights.sum()
    var = sum(w * b.numpy().var(0) for w, b in zip(weights, batches, strict=True)) / weights.sum()
    p = 1 / (1 + np.exp(-(x.numpy() - mean) / np.sqrt(var)))
    expected = x.numpy() * (p + (1 - p) * layer.slope.detach().numpy())
    np.testing.assert_allclose(layer.eval()(x).detach(), expected, rtol=1e-4, atol=1e-5)


def test_dice_does_not_count_what_is_not_valid():
    layer, x, valid = hb.nn.Dice(3), torch.randn(4, 3, 3), torch.from_numpy(MASK)
    torch.testing.assert_close(layer(x, valid)[valid], hb.nn.Dice(3)(x[valid]))
    assert layer.moments[2].eq(0.1).all()
