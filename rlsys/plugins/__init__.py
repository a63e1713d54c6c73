"""Users' Python files, modules and packages, imported by name."""
