"""Models: found, identified by their content, loaded; and how the tokens that they generate become answers."""
