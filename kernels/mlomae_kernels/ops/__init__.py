"""The operators as users call them: one file each, with its schema, shapes, derivatives and documentation."""
