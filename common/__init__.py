# SPDX-License-Identifier: MIT
"""What the six scripts share and what teaches nothing about one method."""


class Refusal(ValueError):
    """Something the user has to change. Its text is one sentence that names the flag or the file and the way out."""

    def __init__(self, text):
        super().__init__(shown(text))


def shown(text, kept=""):
    """The text with what a terminal does not show, or obeys, as Python writes it, but for the characters `kept`: file
    names may hold line breaks, bytes of no letter, and commands to the terminal."""
    return "".join(c if c.isprintable() or c in kept else repr(c)[1:-1] for c in text)
