"""File formats of other projects, one module a format."""
