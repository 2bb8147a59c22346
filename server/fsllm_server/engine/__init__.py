"""Runs and their rounds: a pure core that decides and a shell that acts."""
