"""The gateway: HTTP and SSE on one side, the bus on the other."""
