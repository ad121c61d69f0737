"""What a user can put right is a `UserError`: one sentence that says what is wrong, where, and what to do.

The command lines print it without a traceback and exit with status 2. Everything else is a bug and
keeps its traceback.
"""


class UserError(Exception):
    """Bad input: the message is the whole explanation, fit to be shown as it is."""


def nearest(word: str, known) -> str:
    """` (did you mean 'x'?)` for the known name closest to `word`, or the list of known names."""
    import difflib

    known = sorted(str(k) for k in known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f" (did you mean '{close[0]}'?)"
    return f" (known: {', '.join(known)})" if known else ""
