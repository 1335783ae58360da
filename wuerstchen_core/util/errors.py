import textwrap


class WuerstchenError(ValueError):
    """Something the caller can mend; the message is one line that says what was wrong and what to do."""


def short(error: BaseException) -> str:
    """An error's message on one line, cut where it is long; its type where it has none."""
    return textwrap.shorten(str(error), 160) or type(error).__name__
