"""Settings: what they refuse, and why."""

from dataclasses import replace

import pytest

from pgolf import config
from pgolf.errors import ConfigError
from pgolf.ngram.config import UNSAFE, NgramConfig, spread


def test_defaults_have_no_problem():
    assert NgramConfig().problems() == []


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scorer": "dirichlett"}, "scorer='dirichlett' must be one of neural, dirichlet"),
        ({"scorer": UNSAFE}, "gives no probabilities and is for audits only"),
        ({"orders": ()}, "orders= must be ascending context lengths within 1 to 16"),
        ({"orders": (3, 2)}, "orders=3,2 must be ascending"),
        ({"orders": (0, 2)}, "orders=0,2 must be ascending"),
        ({"hint_orders": (4, 17)}, "hint_orders=4,17 must be ascending context lengths within 1 to 16"),
        ({"chunk": -1}, "chunk=-1 must be at least 0"),
        ({"concentration": ()}, "concentration is empty: it needs a value"),
        ({"concentration": (1.0, 0.0)}, "concentration=1.0,0.0 must be positive"),
        ({"discount": (1.0,)}, r"discount=1.0 must be in [0, 1)"),
        ({"discount": (0.5, 0.2), "strength": (-0.4, -0.2)}, "strength=-0.4,-0.2 must be above -discount"),
        ({"strength": (-0.9,)}, "strength=-0.9 must be above -discount"),
        ({"power": 1.5}, "power=1.5 must be at most 1"),
        ({"row_bits": 32}, "row_bits=32 must be at most 31"),
        ({"min_count": 0}, "min_count=0 must be at least 1"),
        ({"alpha_min": 0.7}, "alpha_min=0.7 must be at most alpha_max=0.6"),
        ({"multipliers": (-1.0,)}, "multipliers=-1.0 must not be negative"),
        ({"hint_share": (1.2,)}, "hint_share=1.2 must be in [0, 1]"),
        ({"hint_count": (0,)}, "hint_count=0 at least 1"),
        ({"hints": 0}, "hints=0 must be at least 1"),
        ({"prior_hits": 0.0}, "prior_hits=0.0 must be positive"),
        ({"experts": "neural,hedge"}, "experts='neural,hedge' must be different ones of"),
        ({"experts": "tilt,tilt"}, "experts='tilt,tilt' must be different ones of"),
        ({"experts": ""}, "experts='' must be different ones of"),
        ({"share": 1e-12}, "share=1e-12 must be 0 or at least 1e-9"),
        ({"share": 0.6}, "share=0.6 must be at most 0.5"),
        ({"mixer_floor": -0.1}, "mixer_floor=-0.1 must be at least 0"),
    ],
)
def test_problems(change, message):
    (found,) = replace(NgramConfig(), **change).problems()
    assert message in found


def test_the_last_value_holds_for_the_rest():
    assert spread((5, 3), (1, 2, 4, 8)) == (5, 3, 3, 3)
    assert spread((5, 3, 1), (1, 2)) == (5, 3)


def test_a_section_that_is_off_until_asked_for():
    assert config.load(["preset=smoke"], {}).config.ngram is None
    got = config.load(["preset=smoke", "ngram=on", "ngram.concentration=5,2.5", "ngram.orders=4,8"], {}).config
    assert got.ngram == NgramConfig(concentration=(5.0, 2.5), orders=(4, 8))
    assert config.from_dict(config.RunConfig, config.to_dict(got)) == got


@pytest.mark.parametrize("text", ["a", "1,b", "nan", "1,inf"])
def test_numbers_that_are_none(text):
    with pytest.raises(ConfigError, match=r"ngram.concentration=.* must be finite numbers such as 0.5,2"):
        config.load(["preset=smoke", "ngram=on", f"ngram.concentration={text}"], {})


def test_the_unsafe_scorer_is_refused_at_the_door():
    with pytest.raises(ConfigError, match="for audits only: no run may score with it"):
        config.load(["preset=smoke", "ngram=on", f"ngram.scorer={UNSAFE}"], {})
