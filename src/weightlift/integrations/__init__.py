"""weightlift under the programs people already run: one module per framework, and what puts them in place.

Nothing here is imported by weightlift itself, and no framework is imported before a program does so.
"""
