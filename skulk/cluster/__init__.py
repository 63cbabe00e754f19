"""The replicated state as pure functions: fold, view, election, reconcile. No clock, no randomness, no I/O."""
