"""Other ways to erase a concept, on the same model, prompts and seeds: gates, edits, and whole systems from their papers."""
