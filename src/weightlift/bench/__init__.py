"""``weightlift bench``: how fast a checkpoint loads on this machine along every path, and by other loaders.

Each measured load is a process of its own (:mod:`weightlift.bench.worker`), told when to begin by the process that
prepares the page cache and looks at memory from outside (:mod:`weightlift.bench.running`).
"""
