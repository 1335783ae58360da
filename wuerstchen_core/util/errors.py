LONGEST = 480  # letters of a message; a name or another program's report may be of any length


class WuerstchenError(ValueError):
    """Something the caller can mend; the message is one line that says what was wrong and what to do."""

    def __init__(self, message: object = ""):
        super().__init__(one_line(message))


def one_line(text: object) -> str:
    """Text from anywhere as one line of at most 480 letters, without control characters: what a terminal would obey is
    spelled out, and of what is longer the middle is left out."""
    text = str(text)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST * 2 // 3]} … {text[-LONGEST // 3 :]}"
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    return text if len(text) <= LONGEST + 3 else f"{text[: LONGEST * 2 // 3]} … {text[-LONGEST // 3 :]}"


def first_line(error: BaseException) -> str:
    """What an error of another library says, without its stack; the error's name if it says nothing."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
