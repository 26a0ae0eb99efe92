"""The bundle on disk: written whole, verified when read."""
