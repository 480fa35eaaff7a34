"""Alembic's scripts; each runs one SQL file of this folder."""
