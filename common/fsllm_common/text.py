"""Words of others, made safe to show: a peer's text may hold terminal commands, forged lines or reversed writing."""


def printable(text: str, limit: int | None = None) -> str:
    """Return ``text`` on one line, every character that is not printable (Unicode's Cc, Cf, Zl, ...) as its escape.

    Args:
        text: Anything.
        limit: Characters to keep of it; all when None.

    """
    text = text[:limit]
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
