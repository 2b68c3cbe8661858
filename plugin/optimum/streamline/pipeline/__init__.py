"""The work of each command, step by step: prune, quantize, run, orthogonality. What they check first is in
`preflight.py`, what they read in `texts.py`, what they export in `exporting.py`.
"""

__all__ = ["exporting", "orthogonality", "preflight", "prune", "quantize", "run", "texts"]
