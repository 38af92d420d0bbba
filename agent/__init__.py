"""One node: the loop that observes, decides and acts."""
