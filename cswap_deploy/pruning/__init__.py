"""What goes: groups, budgets, plans, and physical removal."""
