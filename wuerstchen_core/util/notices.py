"""What a user should know once, and what does not stop the work."""

import logging
from functools import cache


@cache
def tell_once(message: str) -> None:
    """A warning in the log of `wuerstchen_core`, the first time that it is given in this process."""
    logging.getLogger("wuerstchen_core").warning(message)
