"""The folder that ``weightlift guard --readonly-mappings`` puts on ``PYTHONPATH``; see ``sitecustomize.py`` in it."""
