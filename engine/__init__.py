"""What the loop in utils.py stands on: flags, errors, run folders, processes, capture, pictures. It knows no model."""
