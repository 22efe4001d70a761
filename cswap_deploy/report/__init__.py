"""report.html and report.md, made from the manifest and the plan alone."""
