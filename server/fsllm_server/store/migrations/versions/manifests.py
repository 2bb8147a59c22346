"""Each committed round's manifest has its digest beside the event that committed it."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the column; rounds that were committed before have no digest."""
    op.add_column("events", sa.Column("manifest", sa.String(64)))


def downgrade() -> None:
    """Remove the column."""
    op.drop_column("events", "manifest")
