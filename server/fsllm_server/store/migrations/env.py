"""Alembic's environment: run by Alembic, never imported."""

import os

from alembic import context
from sqlalchemy import create_engine

from fsllm_server.store.database import URL_VARIABLE
from fsllm_server.store.schema import metadata

engine = create_engine(os.environ[URL_VARIABLE])
with engine.connect() as connection:
    context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()
engine.dispose()
