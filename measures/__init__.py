"""How classifiers and generators are measured. Nothing here depends on code that an experiment edits."""
