"""Modules that several trainings need."""
