"""MixMin (arXiv 2502.10510): weights under which the mixture of one small model a domain makes the targets likeliest.

    F(x) = -mean_z [ log sum_d x_d exp(l_d(z)) / length(z) ]

with l_d(z) the log-likelihood of the target sample z under the model of domain d. F is convex.

Departures: the released code takes at most 100 steps of exponentiated gradient (eta = 1, from equal weights), which
the division by length makes as small as samples are long; here the minimum, within the caps, is found by the solver
of `mixer.proxies.convex` and comes with a proof. The released code sets a fifth of the samples apart to test on; here
the caller keeps those. For long samples the sum over d is ruled by one model: use short ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mixer.core.errors import DataError
from mixer.proxies.convex import minimise
from mixer.proxies.proposal import FitSetting, Proposal, by_name

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Likelihoods:
    """Of the targets' samples (Z) under one model for each domain."""

    domains: Sequence[str]
    log_zd: Floats  # of a whole sample, in nats
    tokens_z: NDArray[np.int64]

    def __post_init__(self) -> None:
        samples = len(self.tokens_z)
        if not samples or self.log_zd.shape != (samples, len(self.domains)):
            raise DataError(
                f"log-likelihoods of shape {self.log_zd.shape} for {samples} samples and {len(self.domains)} domains. "
                "Give every sample one for each domain's model."
            )
        if np.isnan(self.log_zd).any() or (self.log_zd == np.inf).any() or (self.tokens_z < 1).any():
            raise DataError("a log-likelihood is no number, or a sample has no token. Drop such samples.")
        if not np.isfinite(self.log_zd.max(axis=1)).all():
            raise DataError("a sample is impossible under every domain's model. Drop it.")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Surprise:
    """F, but for what does not depend on x."""

    share_zd: Floats  # likelihoods relative to the sample's largest
    weight_z: Floats

    def value(self, x_d: Floats) -> float:
        return -float(self.weight_z @ np.log(np.maximum(self.share_zd @ x_d, 1e-300)))

    def _relative(self, x_d: Floats) -> Floats:
        return self.share_zd / np.maximum(self.share_zd @ x_d, 1e-300)[:, None]

    def gradient(self, x_d: Floats) -> Floats:
        return -self.weight_z @ self._relative(x_d)

    def hessian(self, x_d: Floats) -> Floats:
        relative_zd = self._relative(x_d)
        return relative_zd.T @ (self.weight_z[:, None] * relative_zd)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixmin:
    READS: ClassVar[str] = "likelihoods"

    def propose(self, table: Likelihoods, setting: FitSetting) -> Proposal:
        if set(table.domains) != set(setting.names):
            raise DataError(
                f"models of {sorted(table.domains)} for the domains {list(setting.names)}. Train one for each."
            )
        log_zd = table.log_zd[:, [list(table.domains).index(name) for name in setting.names]]
        largest_z = log_zd.max(axis=1)
        share_zd = np.exp(log_zd - largest_z[:, None])
        weight_z = 1.0 / (table.tokens_z * len(log_zd))
        found = minimise(_Surprise(share_zd=share_zd, weight_z=weight_z), setting.cap_d, setting.prior_d)
        weights_d = setting.within(found.weights_d)
        loss = -float(weight_z @ (largest_z + np.log(np.maximum(share_zd @ weights_d, 1e-300))))
        return Proposal(
            weights=by_name(setting, weights_d),
            predicted={"target/mixture_of_models": loss},
            notes=(f"at most {found.gap:.1e} nats a token above the minimum", *setting.at_caps(weights_d)),
        )
