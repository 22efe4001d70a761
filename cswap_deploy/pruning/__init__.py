"""What goes: importance, candidates, trials, rounds, refit, and the plan that comes of them."""
