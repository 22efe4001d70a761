"""Pass or fail: budgets held against a bundle's measurements, and their form for CI."""
