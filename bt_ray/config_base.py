"""What all sections of the config share."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
# What holds a secret by its name: such a value is never written down, sent along or shown. The name of one may be.
SECRET_NAME = re.compile(r"(?:^|_)(?:api_?key|key|token|secret|password|passwd|credentials)$", re.IGNORECASE)
Share = Annotated[float, Field(gt=0.0, lt=1.0)]


class Section(BaseModel):
    """Base of every part of the config: frozen, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())
