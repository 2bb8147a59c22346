"""The privacy spent by noisy releases: opacus's RDP accountant (Mironov 2017, arXiv 1702.07476)."""


def epsilon(multiplier: float, releases: int, delta: float, *, sample_rate: float = 1.0) -> float:
    """Return the epsilon, at ``delta``, of so many Gaussian releases.

    A site takes part whenever it is asked and the server knows it, so nothing is amplified by sampling: the rate of a
    release is 1.

    Args:
        multiplier: Standard deviation of the noise over the clip norm.
        releases: How many noisy deltas have left the site.
        delta: The delta of (epsilon, delta).
        sample_rate: The share of the data that a release looks at, when drawn at random in secret.

    """
    from opacus.accountants import RDPAccountant  # imports torch

    if releases == 0:
        return 0.0
    accountant = RDPAccountant()
    accountant.history = [(multiplier, sample_rate, releases)]
    return float(accountant.get_epsilon(delta=delta))
