"""An older path of `qwix._src.providers.lora`, kept for programs that import it."""

from qwix._src.providers.lora import *  # noqa: F403
