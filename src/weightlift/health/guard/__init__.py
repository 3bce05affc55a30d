"""``weightlift guard``: runs a command and stops it before the machine suffers.

Facts go in as values (:mod:`~weightlift.health.guard.facts`), decisions come out of pure functions
(:mod:`~weightlift.health.guard.judge`, :mod:`~weightlift.health.guard.culprits`,
:mod:`~weightlift.health.guard.consumed`), and one thin part samples and acts
(:mod:`~weightlift.health.guard.watch`).
"""
