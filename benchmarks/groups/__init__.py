"""The groups of rows: a file a library, and one each for memory and for starting up.

Each has a function ``rows(effort)``, and imports its library at its head: where that is missing,
the group is skipped.
"""
