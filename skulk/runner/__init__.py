"""The runner role: one process per instance, which serves generation requests from one loaded model."""
