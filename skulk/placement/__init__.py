"""Where a model can run, and why: one pure function that explains itself."""
