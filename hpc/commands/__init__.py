"""The sub-commands of `prothpc`, one module per subject. Heavy imports wait until a stage runs."""


def example(*lines: str) -> str:
    """Return the end of a command's help: how it is typed."""
    return "[bold]Example[/bold]\n\n" + "\n\n".join(f"  {line}" for line in lines)
