"""Running averages of calibrations, for static-range quantization.

A statistic is a dict of float32 sums and an int32 count: {'count', 'sum_of_absmax'} or {'count', 'sum_of_min',
'sum_of_max'}, shaped like the calibration that it averages.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

_SUM = "sum_of_"


class SimpleMovingAverage:
    """The plain mean of all calibrations seen.

    Args:
      bootstrap_steps: while fewer calibrations than this were seen, `get_calibration` gives its default instead.

    >>> import jax.numpy as jnp
    >>> average = SimpleMovingAverage()
    >>> stat = average.init({'absmax': jnp.zeros((1,))})
    >>> stat = average.update(stat, {'absmax': jnp.array([3.0])})
    >>> stat = average.update(stat, {'absmax': jnp.array([5.0])})
    >>> float(average.get_calibration(stat)['absmax'][0])
    4.0
    """

    def __init__(self, bootstrap_steps: int = 0):
        self._bootstrap_steps = bootstrap_steps

    def init(self, calibration: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """An empty statistic for calibrations of these keys and shapes."""
        return {"count": jnp.zeros((), jnp.int32)} | {
            _SUM + key: jnp.zeros(value.shape, jnp.float32) for key, value in calibration.items()
        }

    def update(self, quant_stat: Mapping[str, jax.Array], calibration: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The statistic with one more calibration in it; ValueError if the keys differ."""
        expected = {key.removeprefix(_SUM) for key in quant_stat if key != "count"}
        if expected != set(calibration):
            raise ValueError(f"a statistic of {sorted(expected)} cannot take a calibration of {sorted(calibration)}")
        return {"count": quant_stat["count"] + 1} | {
            _SUM + key: quant_stat[_SUM + key] + value.astype(jnp.float32) for key, value in calibration.items()
        }

    def get_calibration(
        self,
        quant_stat: Mapping[str, jax.Array],
        default_calibration: Mapping[str, jax.Array] | None = None,
    ) -> dict[str, jax.Array]:
        """The mean calibration; with a default, the default while fewer than `bootstrap_steps` (or none) were seen.

        A count of zero without a default gives NaN: there is nothing to average.
        """
        count = quant_stat["count"]
        average = {key.removeprefix(_SUM): value / count for key, value in quant_stat.items() if key != "count"}
        if default_calibration is None:
            return average
        return {
            key: jnp.where(count < max(self._bootstrap_steps, 1), default_calibration[key], value)
            for key, value in average.items()
        }
