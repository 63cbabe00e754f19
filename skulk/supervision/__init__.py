"""Child processes and the home folder: start, watch, restart, end; see the README beside this file."""
