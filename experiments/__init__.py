"""Commands that reproduce the paper's tables and figures, and the data and networks they share."""
