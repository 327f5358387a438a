"""The law by which simulated customers churn, and the exact probability it implies: the best any model could know.

The simulator (`telco.py`) draws from this law; the oracle integrates it. Both read the one definition below.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

CONTRACT_MONTHS = np.array([1, 12, 24])
PRICES = np.array([19.9, 34.9, 49.9, 74.9, 99.9])
"""Monthly price of each plan before any rise. Finitely many, so that the oracle needs finitely many recursions."""


@dataclass(frozen=True)
class ChurnLaw:
    """Hidden engagement e is AR(1) with unit variance; a customer leaves at the end of a day with a logistic hazard.

    On each day, in this order: e moves, the price may rise (once per customer, for good), the customer uses the
    service, and leaves with probability `hazard`.
    """

    persistence: float = 0.985
    base: float = -7.4
    engagement: float = -1.05
    contract: tuple[float, ...] = (0.55, -0.35, -0.8)
    price: float = 0.45
    rise_per_day: float = 0.0015
    rise: float = 1.2

    @property
    def innovation(self) -> float:
        """Standard deviation of a day's shock to the engagement."""
        return float(np.sqrt(1 - self.persistence**2))

    def charges(self, plan: Ints, risen: npt.NDArray[np.bool_]) -> Floats:
        """What a customer pays per month, in currency with two decimals; `plan` indexes PRICES."""
        return np.round(PRICES[plan] * np.where(risen, self.rise, 1.0), 2)

    def hazard(self, engagement: Floats, contract: Ints, charges: Floats) -> Floats:
        """Probability to leave at the end of the day; `contract` indexes CONTRACT_MONTHS."""
        logit = self.base + self.engagement * engagement + np.array(self.contract)[contract] + self.price * charges / 50
        return 1 / (1 + np.exp(-logit))


class ChurnOracle:
    """P(a customer leaves within `days` | all that is hidden at the end of yesterday), exact up to quadrature.

    The survival of the coming days is integrated backward, day by day, over a grid of the engagement, once per
    contract, plan and price state, with future rises averaged in. The rectangle rule converges geometrically for a
    Gaussian kernel: with `nodes_per_sigma` = 3 its error is below 1e-9.
    """

    def __init__(self, law: ChurnLaw, days: int, nodes_per_sigma: int = 3) -> None:
        self.law = law
        reach = 8.0  # standard deviations of the engagement; what lies beyond weighs less than 1e-14
        self.nodes = np.arange(-reach, reach, law.innovation / nodes_per_sigma)
        kernel = self._weights(self.nodes)
        contract, plan = np.divmod(np.arange(len(CONTRACT_MONTHS) * len(PRICES)), len(PRICES))
        # Columns are the pairs of contract and plan, rows the nodes of tomorrow's engagement.
        stays = [
            1 - law.hazard(self.nodes[:, None], contract, law.charges(plan, np.full(len(plan), risen)))
            for risen in (False, True)
        ]
        before = after = np.ones_like(stays[0])
        for day in range(days):
            if day:  # from the survival given that day's engagement to that given the day before's
                before, after = kernel @ before, kernel @ after
            after = stays[1] * after
            before = (1 - law.rise_per_day) * stays[0] * before + law.rise_per_day * after
        self._survival = np.stack([before, after])

    def probability(self, engagement: Floats, contract: Ints, plan: Ints, risen: npt.NDArray[np.bool_]) -> Floats:
        """One number per customer; the arguments are yesterday's state, one entry per customer."""
        survival = self._survival[risen.astype(np.int64), :, contract * len(PRICES) + plan]
        return 1 - np.einsum("ij,ij->i", self._weights(engagement), survival)

    def _weights(self, today: Floats) -> Floats:
        """Row i: how tomorrow's nodes weigh for a customer whose engagement is `today[i]`."""
        z = (self.nodes[None, :] - self.law.persistence * today[:, None]) / self.law.innovation
        weights = np.exp(-0.5 * z * z)
        return weights / weights.sum(axis=1, keepdims=True)
