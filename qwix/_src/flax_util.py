"""An older path of `qwix._src.utils.flax_util`, kept for programs that import it."""

from qwix._src.utils.flax_util import *  # noqa: F403
