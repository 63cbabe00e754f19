"""The messages of the bus, by plane. Level 1: imports nothing of ours but level 0."""
