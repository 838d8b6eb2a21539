"""Two runs side by side, ours or other engines': rows, the verdict of each, their text."""
