# SPDX-License-Identifier: MIT
"""What the six scripts share: building blocks, data, run folders, and the evaluation of encoders."""


class Refusal(ValueError):
    """An error that the user can fix. Its text is one sentence that names the flag or the file, and the remedy."""

    def __init__(self, text):
        super().__init__(shown(text))


def shown(text, kept=""):
    """The text with control characters and undecodable bytes, except those in `kept`, as Python's escapes: file names
    may contain line breaks or commands to the terminal."""
    return "".join(c if c.isprintable() or c in kept else repr(c)[1:-1] for c in text)
