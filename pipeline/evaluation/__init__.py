"""How good a result is: against gold answers, and beside another result."""
