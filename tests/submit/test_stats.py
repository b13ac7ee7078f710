"""Student's tail against closed forms and integration; Welch's test against a worked example; the units."""

import math
from statistics import stdev

import pytest

from pgolf.submit.stats import compare, incomplete_beta, t_tail, welch


@pytest.mark.parametrize("t", [-40.0, -3.0, -0.1, 0.0, 1e-9, 0.5, 1.0, 3.7, 12.0, 1e3, 1e6])
def test_closed_forms(t):
    """1, 2 and 4 degrees of freedom have formulas of their own."""
    root = math.sqrt(t * t + 4)
    tails = {
        1: math.atan2(1, t) / math.pi,
        2: 0.5 - t / (2 * math.sqrt(2 + t * t)),
        4: 0.5 - 0.5 * t / root * (1 + 2 / root**2),  # sin(a) (1 + cos(a)^2 / 2) with tan(a) = t / 2
    }
    for df, want in tails.items():
        assert t_tail(t, df) == pytest.approx(want, rel=1e-11, abs=1e-15), df


@pytest.mark.parametrize("df", [1.7, 2.3, 3.6, 17.5, 150.0])
@pytest.mark.parametrize("t", [0.3, 2.0, 6.0])
def test_fractional_degrees_against_integration(t, df):
    """Simpson's rule on the density, with x = t / u for the infinite end."""
    front = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    density = lambda x: front * (1 + x * x / df) ** (-(df + 1) / 2)
    n, total = 20_000, 0.0
    for i in range(n + 1):
        u = max(i / n, 1e-12)
        value = density(t / u) * t / u**2
        total += value * (1 if i in (0, n) else 4 if i % 2 else 2)
    assert t_tail(t, df) == pytest.approx(total / (3 * n), rel=1e-7)


@pytest.mark.parametrize(
    ("p", "df", "t"),
    [(0.01, 2, 6.964556734), (0.01, 4, 3.746947388), (0.05, 10, 1.812461123), (0.025, 30, 2.042272456),
     (0.005, 120, 2.617421145)],
)  # fmt: skip
def test_printed_tables(p, df, t):
    assert t_tail(t, df) == pytest.approx(p, rel=1e-8)
    assert t_tail(-t, df) == pytest.approx(1 - p, rel=1e-8)


def test_same_as_scipy_where_it_is_installed():
    scipy_stats = pytest.importorskip("scipy.stats", reason="scipy is not installed: closed forms are tested above")
    new, old = [1.1120, 1.1131, 1.1127], [1.1190, 1.1178, 1.1185, 1.1183]
    t, df, p = welch(new, old)
    want = scipy_stats.ttest_ind(old, new, equal_var=False, alternative="greater")
    assert (t, df, p) == pytest.approx((want.statistic, want.df, want.pvalue), rel=1e-10)


def test_welch_by_hand():
    """new 1, 2, 3: variance 1; baseline 5, 7, 9, 11: variance 20/3. t = 6 / sqrt(2), df = 4 / (1/18 + 25/27)."""
    t, df, p = welch([1, 2, 3], [5, 7, 9, 11])
    assert t == pytest.approx(6 / math.sqrt(2)) and df == pytest.approx(4 / (1 / 18 + 25 / 27))
    assert p == pytest.approx(t_tail(t, df)) and 0.003 < p < 0.01
    assert welch([1, 2, 3], [5, 7, 9, 11], margin=6) == pytest.approx((0, df, 0.5))


def test_a_known_mean_is_a_test_of_one_sample():
    new = [1.0, 1.1, 1.2]
    t, df, _ = welch(new, [1.5], margin=0.1)
    assert df == 2 and t == pytest.approx((1.5 - 1.1 - 0.1) / (stdev(new) / math.sqrt(3)))


def test_seeds_that_agree_to_the_last_bit():
    assert welch([1.0, 1.0], [2.0, 2.0])[2] == 0 and welch([2.0, 2.0], [1.0, 1.0])[2] == 1
    assert welch([1.0, 1.0], [1.0, 1.0])[2] == 1, "0/0 shows nothing"
    assert compare([1.0, 1.0], [2.0], "x", 1.0).to_dict()["tests"][0]["t"] is None  # JSON has no infinity


@pytest.mark.parametrize(
    ("bytes_per_token", "margin"), [(2.435930, 0.00296), (3.319681, 0.00217), (3.7266, 0.00194), (3.157152, 0.00228)]
)
def test_the_margin_in_bits_per_byte_depends_on_the_tokenizer(bytes_per_token, margin):
    found = compare([1.0, 1.001], [1.01, 1.011], "x", bytes_per_token * math.log(2))
    assert found.tests[1].margin_bpb == pytest.approx(margin, abs=5e-6)
    assert found.tests[2].margin_bpb == pytest.approx(0.00721, abs=5e-6)
    assert found.gain_nats_per_token == pytest.approx(found.gain_bpb * bytes_per_token * math.log(2))


def test_half_a_margin_is_not_enough():
    """0.0049 bits per byte were once reported as 0.0049 nats; in nats per token that is 0.0083 here."""
    baseline = [1.1200, 1.1203, 1.1197]
    enough = compare([b - 0.0049 for b in baseline], baseline, "x", 2.43593 * math.log(2))
    short = compare([b - 0.0029 for b in baseline], baseline, "x", 2.43593 * math.log(2))
    assert enough.significant and not short.significant and short.tests[0].p < 0.01


def test_one_seed_is_refused():
    with pytest.raises(ValueError, match="two seeds"):
        compare([1.0], [1.1, 1.2], "x", 1.0)


def test_the_beta_function_keeps_its_symmetry():
    for x in (0.01, 0.3, 0.77, 0.999):
        assert incomplete_beta(x, 1.5, 0.5) + incomplete_beta(1 - x, 0.5, 1.5) == pytest.approx(1, abs=1e-14)
    assert incomplete_beta(0.0, 1, 1) == 0 and incomplete_beta(1.0, 1, 1) == 1
    assert incomplete_beta(0.37, 1, 1) == pytest.approx(0.37)
