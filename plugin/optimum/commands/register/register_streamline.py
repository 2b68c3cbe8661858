"""Register the command `streamline`. Every call of optimum-cli runs this file, so it imports nothing slow."""

from optimum.commands.streamline import StreamlineCommand

REGISTER_COMMANDS = [StreamlineCommand]
