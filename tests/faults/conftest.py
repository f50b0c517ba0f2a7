"""The run that nobody disturbs, for the tests of this folder."""

from __future__ import annotations

from tests.support.undisturbed import undisturbed

__all__ = ["undisturbed"]
