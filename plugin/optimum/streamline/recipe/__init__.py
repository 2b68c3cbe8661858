"""What a user can ask for: every option of a run, with its type, range and default. Flags, YAML and Python all become
a `Recipe` here.
"""

__all__ = ["healing", "options", "parsing", "quantities", "recipe", "value_checks", "yaml12"]
