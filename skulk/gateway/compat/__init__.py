"""The JSON that existing clients read, rendered from our view at the border; nothing else knows its names."""
