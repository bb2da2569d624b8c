"""Text of users and of models as it is shown to a person: it cannot steer a terminal or reorder a page."""

import re

# control characters but for tab and line feed, what turns the direction of writing, and halves of characters
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Writes characters that act instead of being seen as escapes, \\u202e; line breaks and tabs stay."""
    return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def one_line(text: object) -> str:
    """Puts a message that may quote anything on one line of a terminal."""
    return visible(" ".join(str(text).splitlines()))


def shorten(text: str, at_most: int = 80) -> str:
    """Cuts what an error quotes to a length that can be read."""
    return text if len(text) <= at_most else text[: at_most - 1] + "…"
