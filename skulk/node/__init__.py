"""The node role: one machine's part: its beat, its runners, its word on what fits."""
