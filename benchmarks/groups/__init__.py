"""The groups of rows: one module per library, one for memory and one for startup.

Each module has a function ``rows(config)``, and imports its library at the top. The runner skips
the group if this import fails.
"""
