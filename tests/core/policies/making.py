from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mixer.core.catalog import Catalog, Domain
from mixer.core.influence import Influence
from mixer.core.mixture import Mixture
from mixer.core.policies import load_policy, policy_class
from mixer.core.ports import Setting
from mixer.core.signal import Evaluation, Signal, on_grid

LETTERS = "abcdefgh"


def make_catalog(*num_rows: int, names: Sequence[str] = LETTERS) -> Catalog:
    """Domains called a, b, c, ...; d0000, d0001, ... if they are many."""
    if names == LETTERS and len(num_rows) > len(LETTERS):
        names = [f"d{i:04}" for i in range(len(num_rows))]
    return Catalog(16, "fake", tuple(Domain(names[i], n, f"content {i}") for i, n in enumerate(num_rows)))


def make_setting(
    catalog: Catalog,
    prior: Mixture | Sequence[float] | None = None,
    *,
    first_window: int = 1,
    planned_windows: int | None = 30,
    targets: Sequence[str] = (),
) -> Setting:
    if prior is not None and not isinstance(prior, Mixture):
        prior = Mixture(np.array(prior, dtype=np.float64))
    return Setting(
        catalog=catalog,
        prior=prior or Mixture.uniform(catalog),
        window_slots=10,
        first_window=first_window,
        planned_windows=planned_windows,
        targets=tuple(targets),
    )


def make_targets(count: int) -> tuple[str, ...]:
    """goal0, goal1, ...: what `make_influence` calls them, too."""
    return tuple(f"goal{place}" for place in range(count))


def make_influence(
    benefit_dt: ArrayLike,
    *,
    error_dt: ArrayLike = 0.0,  # as all that may be given, broadcast to its shape
    targets: Sequence[str] | None = None,
    loss_d: ArrayLike = 2.0,
    target_loss_t: ArrayLike = 2.0,
    gram_dd: ArrayLike | None = None,
    gram_error_dd: ArrayLike = 0.0,
    noise_d: ArrayLike = 0.0,
    target_gram_tt: ArrayLike | None = None,
    rate: float = 1e-3,
) -> Influence:
    """A probe by its benefits; with `gram_dd` also what a probe of the Gram matrix measures."""

    def full(values: ArrayLike, *shape: int) -> np.ndarray:
        return np.array(np.broadcast_to(np.asarray(values, dtype=np.float64), shape))

    benefit = np.asarray(benefit_dt, dtype=np.float64)
    domains, goals = benefit.shape
    return Influence(
        metric="identity",
        targets=make_targets(goals) if targets is None else tuple(targets),
        benefit_dt=benefit.copy(),
        benefit_error_dt=full(error_dt, domains, goals),
        loss_d=full(loss_d, domains),
        target_loss_t=full(target_loss_t, goals),
        rate=rate,
        gram_dd=None if gram_dd is None else full(gram_dd, domains, domains),
        gram_error_dd=None if gram_dd is None else full(gram_error_dd, domains, domains),
        target_gram_tt=None if target_gram_tt is None else full(target_gram_tt, goals, goals),
        noise_d=None if gram_dd is None else full(noise_d, domains),
        tokens=1,
    )


def influence_of(domain_dp: ArrayLike, target_tp: ArrayLike, **more) -> Influence:
    """The probe of known gradients, with their Gram matrices."""
    domain, target = np.asarray(domain_dp, dtype=np.float64), np.asarray(target_tp, dtype=np.float64)
    return make_influence(domain @ target.T, gram_dd=domain @ domain.T, target_gram_tt=target @ target.T, **more)


def make_evaluation(losses: Mapping[str, float]) -> Evaluation:
    """Losses by set: "target/x" or "validation/x"."""
    return Evaluation(sets=tuple(losses), loss_s=np.array(list(losses.values()), dtype=np.float64))


def make_signal(
    catalog: Catalog,
    window: int,
    losses: Sequence[float | None] | None = None,  # None: 1 nat each
    tokens: int = 1 << 10,
    *,
    excess: Sequence[float] | None = None,
    evaluation: Evaluation | None = None,
    influence: Influence | None = None,
) -> Signal:
    """Mean losses by domain; None: the domain gave no row; not finite: its row was bad.

    `excess` is the mean over its tokens by domain; a domain without good rows has none.
    """
    losses = [1.0] * len(catalog) if losses is None else losses
    given = [(place, loss) for place, loss in enumerate(losses) if loss is not None]
    sums = on_grid([loss * tokens for _, loss in given])
    places = [place for place, _ in given]
    signal = Signal.from_rows(window, catalog.fingerprint, len(catalog), places, sums, np.full(len(given), tokens))
    if excess is not None:
        signal = replace(signal, excess_sum_d=on_grid(np.asarray(excess, dtype=np.float64) * signal.tokens_d))
    return replace(signal, evaluation=evaluation, influence=influence)


def needs_of(kind: str) -> frozenset[str]:
    """What a kind asks for, with its defaults where that depends on an option."""
    found: Any = policy_class(kind).NEEDS
    return found if isinstance(found, frozenset) else load_policy(kind).NEEDS
