"""The mean of calibrations, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwix._src.averaging import SimpleMovingAverage

FLOATS = st.floats(-1e3, 1e3, width=32)


@given(st.lists(st.tuples(FLOATS, FLOATS), min_size=1, max_size=6))
def test_mean(values):
    average = SimpleMovingAverage()
    stat = average.init({"min": jnp.zeros(1), "max": jnp.zeros(1)})
    assert stat["count"].dtype == jnp.int32 and stat["sum_of_min"].dtype == jnp.float32
    for low, high in values:
        stat = average.update(stat, {"min": jnp.array([low]), "max": jnp.array([high])})
    assert int(stat["count"]) == len(values)
    result = average.get_calibration(stat)
    np.testing.assert_allclose(result["min"], np.mean([v[0] for v in values]), rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(result["max"], np.mean([v[1] for v in values]), rtol=1e-4, atol=1e-2)


def test_sums_are_kept_in_float32():
    average = SimpleMovingAverage()
    stat = average.init({"absmax": jnp.zeros((2, 1), jnp.bfloat16)})
    for _ in range(300):  # in bfloat16 a sum would stop growing at 256
        stat = average.update(stat, {"absmax": jnp.ones((2, 1), jnp.bfloat16)})
    np.testing.assert_array_equal(average.get_calibration(stat)["absmax"], np.ones((2, 1)))


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_default_while_too_few_were_seen(steps):
    average, default = SimpleMovingAverage(bootstrap_steps=steps), {"absmax": jnp.array([7.0])}
    stat = average.init(default)
    for count in range(5):
        result = jax.jit(average.get_calibration)(stat, default)["absmax"]
        np.testing.assert_array_equal(result, [7.0 if count < max(steps, 1) else 2.0])
        stat = average.update(stat, {"absmax": jnp.array([2.0])})


def test_nothing_seen():
    average = SimpleMovingAverage()
    stat = average.init({"absmax": jnp.zeros(1)})
    assert np.isnan(average.get_calibration(stat)["absmax"]).all()


def test_other_kind_of_calibration_is_an_error():
    average = SimpleMovingAverage()
    stat = average.init({"absmax": jnp.zeros(1)})
    with pytest.raises(ValueError, match=r"\['absmax'\] cannot take a calibration of \['max', 'min'\]"):
        average.update(stat, {"min": jnp.zeros(1), "max": jnp.zeros(1)})
