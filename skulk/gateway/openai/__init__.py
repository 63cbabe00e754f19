"""The OpenAI dialect: requests in, chunks and completions out."""
