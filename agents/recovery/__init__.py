"""What an engineer does on the worst day: dead letters, replay, a restored database, what may be forgotten."""
