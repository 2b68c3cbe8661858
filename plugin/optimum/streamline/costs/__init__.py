"""What a recipe will take before any work is done: memory, room on the disk, and time.

`steps.py` puts the estimates of a recipe's steps together. `speed.py` measures a few layers on this machine,
`choosing_work.py` counts how often a method runs layers, and `healing_memory.py` estimates the memory of healing.
`machine.py` reads the name of another machine.
"""

__all__ = ["choosing_work", "healing_memory", "machine", "speed", "steps"]
