"""Errors that a user meets. Each message names the cause and the fix, in one line."""

from __future__ import annotations


class AtomscopeError(Exception):
    """Something failed for a reason that the user can act on. Exit code 1."""

    exit_code = 1


class UsageError(AtomscopeError):
    """A wrong name, option or combination of options. Exit code 2."""

    exit_code = 2


class MissingDataError(AtomscopeError):
    """Something that an earlier step makes is not there. Exit code 3."""

    exit_code = 3


class DataError(AtomscopeError):
    """Data that must not be trusted: NaN, wrong shape, wrong hash, foreign schema. Exit code 1."""
