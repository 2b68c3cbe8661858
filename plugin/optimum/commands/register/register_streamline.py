"""Found by optimum-cli, and run by every one of its commands: registers `streamline`, and imports nothing heavy."""

from optimum.commands.streamline import StreamlineCommand

REGISTER_COMMANDS = [StreamlineCommand]
