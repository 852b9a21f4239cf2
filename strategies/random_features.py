"""Random features before a closed form: a head that isn't linear in the features, in one round.

Rahimi and Recht 2008, "Weighted Sums of Random Kitchen Sinks": features x [width] pass through a layer that
is drawn once and never fitted,

    h(x) = max(0, W x + b)    with W [hidden, width], b [hidden]

and only the weights of h are fitted, here by one of the closed forms of `closed_form.py`, which see h(x) as
they would see x: sums over clients still add up, so the head is the pooled one whoever holds what. W and b
are what the job's seed draws for a head's hidden layer (torch's default: evenly in ± 1 / sqrt(width)). They
depend on no example, everybody knows them, and they are a part of the model. h is computed in float64, so
that a client's sums don't depend on how many examples are multiplied at a time.

It is the first layer of DeepAFL (Tang et al. 2026, arXiv 2603.00579), whose code draws it so too, with the
ReLU that it offers. DeepAFL's fitted layers on top take a round each, and aren't here.
"""

from __future__ import annotations

import torch

from atoll.protocol.tensors import Tensors

FIRST, LAST = "head.0", "head.2"
"""The names of the two layers of a head with a hidden layer; a ReLU is between them."""


def random_features(features: torch.Tensor, model: Tensors) -> torch.Tensor:
    """h(x) [n, hidden] in float64 of features [n, width]; the features where the head has no hidden layer.

    >>> model = {"head.0.weight": torch.tensor([[1.0], [-1.0]]), "head.0.bias": torch.tensor([0.5, 0.0])}
    >>> random_features(torch.tensor([[2.0], [-3.0]]), model).tolist()
    [[2.5, 0.0], [0.0, 3.0]]
    """
    if f"{FIRST}.weight" not in model:
        return features
    weight, bias = (model[f"{FIRST}.{part}"].to(torch.float64) for part in ("weight", "bias"))
    return (features.to(torch.float64) @ weight.T + bias).clamp_min(0)


def last_layer(model: Tensors) -> str:
    """The name of the linear layer that a closed form computes: the last one of the head."""
    return LAST if f"{LAST}.weight" in model else "head"


def with_last_layer(model: Tensors, head: Tensors) -> Tensors:
    """The model whose last layer is a closed form's `head.weight` [classes, hidden or width] and `head.bias`.

    >>> model = {"head.0.weight": torch.ones(2, 1), "head.2.weight": torch.zeros(3, 2)}
    >>> sorted(with_last_layer(model, {"head.weight": torch.ones(3, 2)}))
    ['head.0.weight', 'head.2.weight']
    """
    layer = last_layer(model)
    return model | {f"{layer}.{name.removeprefix('head.')}": tensor for name, tensor in head.items()}
