"""What the six scripts share and what teaches nothing about one method."""


class Refusal(ValueError):
    """Something the user has to change. Its text is one sentence that names the flag or the file and the way out."""
