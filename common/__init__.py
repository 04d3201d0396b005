# SPDX-License-Identifier: MIT
"""What the six scripts share: building blocks, data, the folder of a run, the evaluation of its encoder."""


class Refusal(ValueError):
    """Something the user has to change. Its text is one sentence that names the flag or the file and the way out."""

    def __init__(self, text):
        super().__init__(shown(text))


def shown(text, kept=""):
    """The text with control characters and undecodable bytes as Python's escapes, except those in `kept`: the name of a
    file may contain line breaks, or commands to the terminal."""
    return "".join(c if c.isprintable() or c in kept else repr(c)[1:-1] for c in text)
