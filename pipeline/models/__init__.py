"""Models: found, told apart, loaded, and what their tokens mean. It does not know what is asked of them."""
