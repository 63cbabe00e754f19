"""The command line: one table of commands, each in its own module that is imported when it is used."""
