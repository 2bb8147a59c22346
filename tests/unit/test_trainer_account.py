import math

import pytest

from fsllm_client.trainer.account import epsilon

pytestmark = pytest.mark.filterwarnings("ignore")  # opacus warns of its own imports


@pytest.mark.slow
@pytest.mark.parametrize(("multiplier", "expected"), [(0.6, 7.28), (1.0, 1.83), (2.0, 0.49)])
def test_sampled_releases_cost_what_opacus_is_known_to_say(multiplier: float, expected: float) -> None:
    assert epsilon(multiplier, 190, 1e-5, sample_rate=0.016) == pytest.approx(expected, abs=0.01)


def test_full_releases_follow_the_closed_form_of_renyi_privacy() -> None:
    # Every release of multiplier z is (alpha, alpha / 2z^2)-RDP; opacus converts by Balle et al. 2020, theorem 21.
    z, releases, delta = 10.0, 100, 1e-5

    def bound(alpha: float) -> float:
        rdp = releases * alpha / (2 * z**2)
        return rdp + math.log((alpha - 1) / alpha) - (math.log(delta) + math.log(alpha)) / (alpha - 1)

    best = min(bound(1 + a / 10) for a in range(1, 1000))
    assert epsilon(z, releases, delta) == pytest.approx(best, rel=1e-3)


def test_more_releases_cost_more_and_none_cost_nothing() -> None:
    assert epsilon(5.0, 0, 1e-5) == 0
    assert epsilon(5.0, 1, 1e-5) < epsilon(5.0, 2, 1e-5)
