"""Attention to rows of prompts and responses."""
