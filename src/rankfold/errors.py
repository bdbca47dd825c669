"""The errors Rankfold raises for bad input: each names the cause and the fix; the command line prints one line."""


class RankfoldError(ValueError):
    """Something the caller gave cannot be used; the message says what, why, and what would work."""


class AdapterFileError(RankfoldError):
    """An adapter on disk is missing, damaged, hostile, or made for another base model."""


class UnsupportedError(RankfoldError):
    """The mathematics of a method, or the kind of a layer, rules out what was asked."""
