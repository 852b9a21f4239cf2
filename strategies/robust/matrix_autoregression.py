"""Matrix autoregression (Chen, Xiao and Yang 2021, "Autoregressive models for matrix-valued time series").

    Theta_s = A Theta_{s-1} B + noise,    A, B = argmin sum_s || Theta_s - A Theta_{s-1} B ||_F^2

for matrices [numbers, clients], fitted by alternating least squares: with A or B fixed, the equations of the
other are linear. As in FLANDERS' code they are regularised by `ridge` times the identity, in units of the
matrices' mean square. B starts as the identity, so nothing is drawn at random.

The step for A, with X the columns Theta_{s-1} B of all pairs and Y those of Theta_s, is

    A = Y X' (X X' + ridge)^-1 = Y (X' X + ridge)^-1 X'

so that A Theta = Y V with V = (X' X + ridge)^-1 X' Theta: all steps take inner products of the columns, and
A, which has a row for each number, is never formed.
"""

from __future__ import annotations

import torch


def forecast(past: torch.Tensor, ridge: float, iterations: int) -> torch.Tensor:
    """The forecast [clients, numbers] of the round after `past` [rounds, clients, numbers], in float64.

    After a single round it is that round itself.

    >>> doubling = torch.tensor([[[1.0, 2.0]], [[2.0, 4.0]], [[4.0, 8.0]]], dtype=torch.float64)
    >>> forecast(doubling, ridge=1e-9, iterations=5).round(decimals=6).tolist()
    [[8.0, 16.0]]
    """
    rounds, clients, numbers = past.shape
    if rounds == 1:
        return past[0]
    columns, fitted = past.reshape(rounds * clients, numbers), (rounds - 1) * clients
    products = columns @ columns.T
    products = products / (products.diagonal().sum() / (rounds * clients * numbers) or 1.0)
    before, after = products[:fitted], products[clients:, clients:]
    costs = ridge * torch.eye(fitted, dtype=torch.float64)
    b, pairs = torch.eye(clients, dtype=torch.float64), torch.eye(rounds - 1, dtype=torch.float64)
    for _ in range(iterations):
        blocks = torch.kron(pairs, b.contiguous())
        v = torch.linalg.solve(blocks.T @ before[:, :fitted] @ blocks + costs, blocks.T @ before)
        squares, moments = costs[:clients, :clients], torch.zeros_like(b)
        for start in range(0, fitted, clients):
            pair = slice(start, start + clients)
            squares = squares + v[:, pair].T @ after @ v[:, pair]
            moments = moments + v[:, pair].T @ after[:, pair]
        b = torch.linalg.solve(squares, moments)
    expected: torch.Tensor = (v[:, -clients:] @ b).T @ columns[clients:]
    return expected
