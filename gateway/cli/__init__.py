"""The command line: ``main`` puts it together, each larger command is a file; ``live`` and ``progress`` show."""
