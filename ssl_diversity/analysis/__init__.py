"""The results table in, numbers and sentences out."""
