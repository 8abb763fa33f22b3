"""Speed, measured: a script per question, a CSV of what it measured. See each one's --help."""
