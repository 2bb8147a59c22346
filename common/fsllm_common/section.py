"""What every part of a file that people write is read into: a plan's, a site's policy's, an algorithm's parameters."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Immutable, and strict about unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
