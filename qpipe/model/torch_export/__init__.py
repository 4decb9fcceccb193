"""torch modules in: exported, named as torch names them, or refused in one line."""
