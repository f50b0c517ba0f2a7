"""What DSPy's own parsers raise beside their error, for values that no type takes."""

from __future__ import annotations

from typing import Any

from dspy.utils.exceptions import AdapterParseError


class OneError:
    """A mixin before one of dspy's adapters: an answer that cannot be read is an AdapterParseError, whatever is wrong with it,
    so that it is the answer's fault and not the program's."""

    format_name: str

    def parse(self, signature: Any, completion: str) -> dict[str, Any]:
        try:
            return dict(super().parse(signature, completion))  # type: ignore[misc]
        except AdapterParseError:
            raise
        except (TypeError, ValueError, RecursionError, MemoryError) as error:  # an object for an enum, a tower of brackets
            raise AdapterParseError(self.format_name, signature, completion, f"{type(error).__name__}: {error}") from None
