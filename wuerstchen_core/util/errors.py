class WuerstchenError(ValueError):
    """Something the caller can mend; the message is one line that says what was wrong and what to do."""
