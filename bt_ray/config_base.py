"""What all sections of the config share."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
# What holds a secret by its name: such a value is never written down, sent along or shown. The name of one may be.
SECRET_NAME = re.compile(r"(?:^|_)(?:api_?key|key|token|secret|password|passwd|credentials)$", re.IGNORECASE)
OWN_RESOURCES = ("CPU", "GPU", "memory", "object_store_memory")  # which Ray has other arguments for


def _named(resources: dict[str, float]) -> dict[str, float]:
    if own := [name for name in resources if name in OWN_RESOURCES]:
        raise ValueError(
            f"{own[0]} is not for this key: engines have num_cpus and tensor_parallel_size, weight steps num_workers"
        )
    return resources


NamedResources = Annotated[dict[str, Annotated[float, Field(gt=0)]], AfterValidator(_named)]
Share = Annotated[float, Field(gt=0.0, lt=1.0)]


class Section(BaseModel):
    """Base of every part of the config: frozen, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())
