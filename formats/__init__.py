"""Other people's files: model folders, tokenizers, text, HellaSwag."""
