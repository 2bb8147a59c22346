"""Bring the database of ``FSLLM_MIGRATE_URL`` to the newest revision."""

from pathlib import Path

from alembic import command
from alembic.config import Config


def main() -> None:
    """Upgrade to head."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    command.upgrade(config, "head")


main()
