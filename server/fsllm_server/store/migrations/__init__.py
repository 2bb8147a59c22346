"""Alembic's migrations of the server's schema; run as a module, it brings a database to the newest."""
