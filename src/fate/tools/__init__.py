"""What is asked of a model besides text, before it is loaded or after: each tool a file. None loads a model itself."""
